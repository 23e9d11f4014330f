"""A pair step of preference optimisation against the textbook's, and DoRA against LoRA.

Textbook: one forward each for chosen, rejected, policy, reference and draw, the observation encoded again every time.
Concatenated, as TRL does it: chosen and rejected in one batch, the rest likewise. Ours: the observation once for all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Draws

PAIRS = 16
BETA = 0.1
SIZES = ((2048, 2048, 400), (4096, 1024, 400), (1024, 4096, 400), (4096, 1024, 50))
"""Layers that DoRA is timed on: out, in, tokens. 400 tokens are four pairs of chunks of 50; the norm costs as much
however few tokens there are, so the last size, a single chunk, is the worst case and a figure of its own."""
PARITY = 1e-6


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gradients are compared first; without parity there is no ratio.

    Figures:
        gradients_equal: packed and textbook gradients differ by at most 1e-6 (norm of the difference over the norm), in
            float64; the rounding of float32 alone is about that much, because both sides of a pair nearly cancel.
        speedup_over_textbook_k1, _k4: with LoRA, of a pair step with cached reference scores, for 1 and 4 draws.
        speedup_over_concatenated_k1, _k4: against the form with chosen and rejected in one batch.
        speedup_without_cache_k4: with the adapter-off pass instead of cached scores.
        pair_step_over_sft_step: cached reference and one draw over the imitation step on the same observations.
        memory_over_sft: bytes kept for the backward pass (weights left out), likewise.
        margin_variance_ratio: variance of the margin over draws, independent over shared, at equal cost.
        dora_over_lora: forward and backward of a layer by the closed form, the worst of three sizes at 400 tokens.
        dora_over_lora_50_tokens: the same at 50 tokens.
        peft_dora_over_lora: of peft's DoRA at 400 tokens.
        dora_equals_peft: outputs and gradients of both agree to 1e-6.
    """
    from bench.train import _base
    from burnish.core.config import PeftConfig
    from burnish.core.provenance import machine
    from burnish.policies import load_policy
    from burnish.train.optim import add_adapters

    repeats = 2 if args.quick else 11
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, name = _base(Path(folder))
            policy = load_policy(path)
        policy.float()
        add_adapters(policy, PeftConfig(method="lora", rank=16, alpha=32))
        _disturb(policy)
        with in_double():
            steps = _Steps(policy.double())
            parity = {k: steps.parity(k) for k in (1, 4)}
        steps = _Steps(policy.float())
        if max(parity.values()) > PARITY:
            raise BurnishError(f"packed gradients differ from the textbook's by {max(parity.values()):.1e}",
                               f"at most {PARITY:.0e}")  # fmt: skip
        seconds = _in_turns(steps.all(), repeats)
        kept = {name: _kept_bytes(step) for name, step in (("sft", steps.sft), ("pair", steps.packed(1, "cached")))}
        ratio, scatter = steps.margin_variance(4, 8 if args.quick else 64)
        dora = _dora(repeats)
    finally:
        torch.set_num_threads(threads)
    info = machine()
    return {
        "name": "prefer", "device": info.pop("device"), "versions": info, "n": repeats,
        "figures": {
            "gradients_equal": True, **_speedups(seconds), "memory_over_sft": kept["pair"] / kept["sft"],
            "margin_variance_ratio": ratio, **_dora_figures(dora),
        },
        "detail": {
            "policy": name, "parameters": sum(p.numel() for p in policy.parameters()), "adapters": "LoRA, rank 16",
            "pairs": PAIRS, "threads": 1, "clock": "CPU seconds of the process, medians, in turns",
            "seconds": {key: statistics.median(value) for key, value in seconds.items()},
            "gradient_difference": parity, "bytes_kept": kept, "margin_variance": scatter,
            "dora_layers": dora,
        },
    }  # fmt: skip


def _speedups(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        **{f"speedup_over_textbook_k{k}": _ratio(seconds, f"textbook_{k}", f"packed_{k}") for k in (1, 4)},
        **{f"speedup_over_concatenated_k{k}": _ratio(seconds, f"concatenated_{k}", f"packed_{k}") for k in (1, 4)},
        "speedup_without_cache_k4": _ratio(seconds, "textbook_4", "packed_off_4"),
        "pair_step_over_sft_step": _ratio(seconds, "packed_1", "sft"),
    }


def _dora_figures(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dora_over_lora": max(layer["ours"] for layer in layers[:-1]),
        "dora_over_lora_50_tokens": layers[-1]["ours"],
        "peft_dora_over_lora": max(layer["peft"] for layer in layers[:-1]),
        "dora_equals_peft": max(layer["difference"] for layer in layers) <= PARITY,
    }


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, everything is float64, also where the policy's code asks for float32 by name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch, "float32", torch.float64), patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


class _Steps:
    """Forward and backward passes of one pair batch in several layouts, on equal draws."""

    def __init__(self, policy):
        self.policy = policy.train()
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.batch, self.candidates = _synthetic(policy)
        self.random = torch.Generator().manual_seed(0)
        self.draws = {k: self._draw(k) for k in (1, 4)}
        self.cache = {k: self._reference(k) for k in (1, 4)}

    def _draw(self, k: int) -> Draws:
        drawn = self.policy.draw(PAIRS * k, self.random)
        return Draws(drawn.noise.unflatten(0, (PAIRS, k)), drawn.time.unflatten(0, (PAIRS, k)))

    def _reference(self, k: int) -> Tensor:
        from burnish.methods.reference import without_adapters

        with torch.no_grad(), without_adapters(self.policy):
            return self.policy.scores(self.batch, self.candidates, self.draws[k]).mean(-1)

    def sft(self) -> Tensor:
        """The imitation loss on the chosen chunks of the same observations."""
        draws = Draws(self.draws[1].noise[:, 0], self.draws[1].time[:, 0])
        return self.policy.loss({**self.batch, "action": self.candidates[:, 0]}, draws).total

    def packed(self, k: int, reference: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            before = self.cache[k] if reference == "cached" else self._reference(k)
            return _loss(self.policy.scores(self.batch, self.candidates, self.draws[k]).mean(-1), before)

        return step

    def textbook(self, k: int) -> Callable[[], Tensor]:
        from burnish.methods.reference import without_adapters
        from burnish.policies.base import Policy

        def step() -> Tensor:
            with torch.no_grad(), without_adapters(self.policy):
                before = Policy.scores(self.policy, self.batch, self.candidates, self.draws[k]).mean(-1)
            return _loss(Policy.scores(self.policy, self.batch, self.candidates, self.draws[k]).mean(-1), before)

        return step

    def concatenated(self, k: int) -> Callable[[], Tensor]:
        from burnish.methods.reference import without_adapters

        twice: Batch = {key: v + v if isinstance(v, list) else torch.cat([v, v]) for key, v in self.batch.items()}
        chunks = torch.cat([self.candidates[:, 0], self.candidates[:, 1]])
        noise, times = (torch.cat([x, x]) for x in (self.draws[k].noise, self.draws[k].time))

        def scores() -> Tensor:
            each = [self.policy.score(twice, chunks, Draws(noise[:, i], times[:, i])) for i in range(k)]
            return torch.stack(each).mean(0).view(2, PAIRS).T

        def step() -> Tensor:
            with torch.no_grad(), without_adapters(self.policy):
                before = scores()
            return _loss(scores(), before)

        return step

    def all(self) -> dict[str, Callable[[], None]]:
        found = {"sft": self.sft, "packed_off_4": self.packed(4, "off")}
        for k in (1, 4):
            found |= {
                f"textbook_{k}": self.textbook(k), f"concatenated_{k}": self.concatenated(k),
                f"packed_{k}": self.packed(k, "cached"),
            }  # fmt: skip
        return {name: self._with_backward(step) for name, step in found.items()}

    def _with_backward(self, step: Callable[[], Tensor]) -> Callable[[], None]:
        def both() -> None:
            for p in self.trained:
                p.grad = None
            step().backward()

        return both

    def parity(self, k: int) -> float:
        """Largest difference of a packed layout's gradient from the textbook's, over the latter's norm."""
        found = []
        for step in (self.textbook(k), self.packed(k, "cached"), self.packed(k, "off"), self.concatenated(k)):
            self._with_backward(step)()
            found.append(torch.cat([p.grad.flatten().double() for p in self.trained if p.grad is not None]))
        return max(float((other - found[0]).norm() / found[0].norm()) for other in found[1:])

    @torch.no_grad()
    def margin_variance(self, k: int, samples: int) -> tuple[float, dict[str, float]]:
        """Variance over draws of the margin, averaged over pairs: independent over shared draws, and both."""
        from burnish.methods.prefer.losses import margin
        from burnish.methods.reference import without_adapters

        def one(shared: bool) -> Tensor:
            sets = [self._draw(k) for _ in range(1 if shared else 4)]
            both = [sets[0] if shared else _per_side(*pair) for pair in ((sets[0], sets[-1]), (sets[1:3] or sets * 2))]
            now = self.policy.scores(self.batch, self.candidates, both[0]).mean(-1)
            with without_adapters(self.policy):
                before = self.policy.scores(self.batch, self.candidates, both[1]).mean(-1)
            return margin(now, before)

        found = {
            name: float(torch.stack([one(name == "shared") for _ in range(samples)]).var(0).mean())
            for name in ("shared", "independent")
        }
        return found["independent"] / found["shared"], found


def _per_side(one: Draws, two: Draws) -> Draws:
    """Draws [B, 2, K, ...]: chosen sees the first, rejected the second."""
    return Draws(torch.stack([one.noise, two.noise], 1), torch.stack([one.time, two.time], 1))


def _loss(scores: Tensor, before: Tensor) -> Tensor:
    from burnish.methods.prefer.losses import dpo, margin

    return dpo(margin(scores, before), BETA).mean()


def _synthetic(policy) -> tuple[Batch, Tensor]:
    """Random observations, and two chunks for each, in environment units."""
    random = torch.Generator().manual_seed(1)
    batch: Batch = {
        f"observation.images.{camera}": torch.rand(PAIRS, 3, policy.image_size, policy.image_size, generator=random)
        for camera in policy.cameras
    }
    batch["observation.state"] = torch.randn(PAIRS, policy.state_dim, generator=random)
    batch["task"] = ["lift the red cube"] * PAIRS
    return batch, torch.randn(PAIRS, 2, policy.chunk_size, policy.action_dim, generator=random)


def _disturb(policy: nn.Module) -> None:
    """Make the adapters differ from nothing, so that policy and reference differ."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.02, generator=random)


def _kept_bytes(step: Callable[[], Tensor]) -> int:
    """Bytes of all distinct tensors that autograd keeps for the backward pass of `step`, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor._base is not None and _of_parameter(tensor)):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(kept.values())


def _of_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor._base, nn.Parameter)


def _in_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(repeats + 1), desc="in turns", file=sys.stderr):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - begin)
    return seconds


def _ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def _dora(repeats: int) -> list[dict[str, Any]]:
    """For each size: time of both DoRA layers over LoRA's, and how far apart the two are."""
    found = []
    for out, inside, tokens in SIZES:
        layers = {kind: _layer(kind, out, inside) for kind in ("lora", "peft", "ours")}
        x = torch.randn(tokens, inside, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
        outputs = {kind: _forward_backward(layer, x) for kind, layer in layers.items()}
        difference = max(_difference(a, b) for a, b in zip(outputs["ours"], outputs["peft"], strict=True))
        timed = {kind: partial(_forward_backward, layer, x) for kind, layer in layers.items()}
        seconds = _in_turns(timed, repeats)
        found.append({
            "out": out, "in": inside, "tokens": tokens, "difference": difference,
            "ours": _ratio(seconds, "ours", "lora"), "peft": _ratio(seconds, "peft", "lora"),
        })  # fmt: skip
    return found


def _layer(kind: str, out: int, inside: int, rank: int = 16) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    from burnish.train.dora import use_closed_form

    random = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(inside, out, bias=False))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], use_dora=kind != "lora")
    with torch.no_grad():
        model[0].weight.normal_(0.0, inside**-0.5, generator=random)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.normal_(0.0, 0.02, generator=random)
    if kind == "ours":
        use_closed_form(model)
    return model


def _forward_backward(layer: nn.Module, x: Tensor) -> Sequence[Tensor]:
    trained = [p for p in layer.parameters() if p.requires_grad]
    for p in (*trained, x):
        p.grad = None
    y = layer(x)
    y.square().mean().backward()
    return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in trained)]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
