"""SmolVLA's own size on a CPU: the exact tier against LeRobot's sampler, and what exact caches save.

450 million random weights, language model and expert in bf16 as LeRobot loads them, two images of 512 pixels. A call
takes seconds where the processor multiplies bf16, and more than a minute where it does not.
"""

import argparse
from typing import Any


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Process time of one thread, in turns.

    Figures:
        real_exact_over_lerobot, real_denoise_bf16_over_lerobot: LeRobot's time over the exact tier's, of a call and of
            its denoising steps; none where the bits are not equal.
        real_denoise_share_lerobot: denoising steps' part of LeRobot's whole call.
        real_hit_same_over_plain, real_hit_state_over_plain: time of a call on the same observation, and on one with
            another state alone, over one without caches; fused tier.
    """
    import torch

    from bench.runtime_caches import saving
    from bench.runtime_executor import compare
    from burnish.core.provenance import machine
    from workshop.real import make_real

    torch.set_num_threads(1)
    rounds = 2 if args.quick else 20
    policy = make_real("smolvla", device="cpu", cameras=("front", "wrist"), image_size=256).eval()
    policy.inner.to(torch.bfloat16)
    found, executor = compare(policy, ("exact",), rounds)
    found = {key.replace("denoise_exact", "denoise_bf16"): value for key, value in found.items()}
    saved = saving(policy, 1 if args.quick else 3, 1)
    found |= {f"hit_{kind}_over_plain": saved[kind] / saved["plain"] for kind in ("same", "state")}
    info = machine("cpu")
    return {"name": "real", "device": info.pop("device"), "versions": info, "n": rounds,
            "figures": {f"real_{key}": value for key, value in found.items()},
            "detail": {"executor": executor, "process_ms": saved}}  # fmt: skip
