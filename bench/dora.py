"""What DoRA keeps for the backward pass beside what LoRA keeps: the released code's layer, peft's, and ours.

Bytes are counted and not timed: of the attention of one layer of OpenVLA (Llama 2 7B), beside that layer's frozen
weights in bf16, so that the ratio is the model's own.
"""

import argparse
from typing import Any

WIDTH, HIDDEN, RANK, TOKENS = 4096, 11008, 32, 300
"""Of the language model, the adapters, and an observation with its action tokens."""
ATTENTION = 4
"""Projections with adapters in a layer: q, k, v, o."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Frozen weights of a layer and all that its attention keeps, DoRA's over LoRA's.

    Figures:
        released_memory_over_lora: CrossVLA's layer, which forms m (W + s BA) / |W + s BA| and its graph.
        peft_memory_over_lora, dora_memory_over_lora: peft's layer, and ours, whose norm has a closed form.
        released_kept_mb, peft_kept_mb, dora_kept_mb, lora_kept_mb: a projection's alone.
    """
    import torch

    from bench.prefer import _kept_bytes, _layer
    from burnish.core.provenance import machine

    width = 256 if args.quick else WIDTH
    layers = {"lora": _layer("lora", width, width, RANK), "peft": _layer("peft", width, width, RANK),
              "dora": _layer("ours", width, width, RANK)}  # fmt: skip
    layers["released"] = _released(layers["peft"])
    x = torch.randn(TOKENS, width, dtype=torch.bfloat16).requires_grad_(True)
    kept = {kind: _kept_bytes(lambda layer=layer: layer.bfloat16()(x).sum()) for kind, layer in layers.items()}
    frozen = 2 * width * (ATTENTION * width + 3 * round(HIDDEN * width / WIDTH))
    whole = {kind: frozen + ATTENTION * count for kind, count in kept.items()}
    lora = whole.pop("lora")
    figures: dict[str, Any] = {f"{kind}_memory_over_lora": size / lora for kind, size in whole.items()}
    figures |= {f"{kind}_kept_mb": count / 1e6 for kind, count in kept.items()}
    info = machine("cpu")
    return {"name": "dora", "device": info.pop("device"), "versions": info, "n": 1, "figures": figures,
            "detail": {"width": width, "rank": RANK, "tokens": TOKENS, "frozen_bytes_of_a_layer": frozen}}  # fmt: skip


def _released(model: Any) -> Any:
    """The same layer as the paper's code computes it: the whole weight, its norms in the graph."""
    import torch
    from torch import nn
    from torch.nn.functional import linear

    (layer,) = (module for module in model.modules() if hasattr(module, "lora_magnitude_vector"))

    class Released(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
            self.down = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
            self.up = nn.Parameter(layer.lora_B["default"].weight.detach().clone())
            self.magnitude = nn.Parameter(self.frozen.norm(dim=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = self.frozen + 2.0 * (self.up @ self.down)
            return linear(x, self.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True))

    return Released()
