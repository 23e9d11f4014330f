"""`python -m bench NAME`: one JSON object of figures, measured against peers side by side in one run.

A bench is a module here with `run(args) -> dict`, holding name, device, versions, n, figures (flat) and detail.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

# name: the bounds that the figures are meant to keep, shown beside them
ON_GPU = ("align", "decode", "isolate", "train")
"""Benches that can run on a GPU; the others measure the CPU, whatever else the machine has."""
BENCHES: dict[str, dict[str, str]] = {
    "align": {
        "step_ratio_cached": "<= 1.10",
        "cache_fill_speedup": ">= 3",
        "half_exact": "true",
        "pca_cosine": ">= 0.99",
    },
    "data": {
        "tabletop_demos_per_cpu_min": ">= 250",
        "metaworld_demos_per_cpu_min": ">= 200",
        "libero_goal_demos_per_cpu_min": ">= 25",
    },
    "decode": {
        "bidirectional_over_ours": ">= 5",
        "prompt_cached_over_ours": ">= 1.0",
        "long_prompt_cached_over_ours": ">= 1.4",
        "first_action_speedup": ">= 8",
        "auto_worst_over_best": "<= 1.05",
        "tokens_equal": "true",
    },
    "eval": {"speedup_over_lerobot_eval": ">= 5", "outcomes_equal": "true"},
    "merge": {
        "time_over_mergekit": "<= 0.45",
        "throughput_over_copy": ">= 0.30",
        "peak_rss_gb": "<= 0.6",
        "memory_flat": "true",
        "every_element_exact": "true",
        "agrees_with_mergekit": "true",
    },
    "memory": {
        f"{name}_over_plain": "<= 1.1"
        for name in ("align", "isolate", "isolate_aegis", "capability", "capability_projection", "prefer", "distill")
    }
    | {"method_extra_p": "<= 1.1", "cost_error": "<= 0.15"},
    "cost": {"smolvla_full": "<= 12", "pi05_lora": "<= 22", "pi05_full": "<= 72"},
    "dora": {"dora_memory_over_lora": "<= 1.1"},
    "prefer": {
        "gradients_equal": "true",
        "speedup_over_textbook_k1": ">= 2.4",
        "speedup_over_textbook_k4": ">= 5",
        "pair_step_over_sft_step": "<= 1.3",
        "memory_over_sft": "<= 1.25",
        "dora_over_lora": "<= 1.2",
        "dora_equals_peft": "true",
    },
    "isolate": {
        "step_ratio_paper": "<= 1.8",
        "step_ratio_default": "<= 1.2",
        "default_cosine": ">= 0.95",
        "edit_speedup_over_loop": ">= 2",
        "edit_error": "<= 2e-6",
    },
    "real": {"real_denoise_bf16_over_lerobot": ">= 1.15"},
    "runtime": {
        **{f"exact_bitwise_{name}": "true" for name in ("smolvla", "pi0", "pi05", "discrete")},
        "caches_bitwise": "true",
        "small_exact_over_lerobot": ">= 1.4",
        "small_denoise_exact_over_lerobot": ">= 1.8",
        "small_compiled_denoise_over_lerobot": ">= 3",
        "pi05_denoise_exact_over_lerobot": ">= 1.6",
        "passes_euler_over_auto": ">= 2",
        "auto_error": "<= 0.25",
        "one_pass_error": "<= 0.40",
        "guided_identity_over_plain": "<= 1.05",
        "guided_vjp_over_plain": "<= 1.6",
        "rtc_gaussian_error": "<= 1e-9",
        "bid8_over_one": "<= 4",
        "serve_overhead_p50_ms": "<= 1.5",
        "serve_overhead_p99_ms": "<= 8",
        "serve_batched_over_blocking": ">= 3.5",
        "hostile_refused": "1",
        "openpi_client": "true",
        "lerobot_client": "true",
    },
    "retrieve": {
        "head_minutes": "<= 5",
        "index_100k_seconds": "<= 60",
        "query_ms": "<= 5",
        "speedup_over_sort": ">= 1.5",
        "memory_over_vectors": "<= 2",
        "recall_equals_brute_force": "true",
    },
    "scale": {
        "fsdp_max_difference": "<= 1e-6",
        "resume_other_ranks_equal": "true",
        "ray_outcomes_equal": "true",
        "cost_error": "<= 0.15",
        "method_extra_p": "<= 1.1",
        "mix_resume_equal": "true",
        "cached_gb_25k_frames": "<= 12",
        "data_wait_share_streaming": "<= 0.05",
    },
    "start": {"help_s": "<= 0.3", "command_help_s": "<= 0.6"},
    "train": {"data_wait_share": "<= 0.05", "loop_overhead": "<= 0.03"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m bench train --json --output results/bench_train.json"
    parser.add_argument("name", choices=sorted(BENCHES))
    parser.add_argument("--json", action="store_true", help="print the whole JSON object instead of a table")
    parser.add_argument("--output", default="", help="also write the JSON object to this file")
    parser.add_argument("--mergekit", default="", metavar="PYTHON", help="merge: interpreter with mergekit, the peer")
    parser.add_argument("--size", default="tiny", choices=("tiny", "smolvla"), help="memory: of the policy")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help=f"cuda: {', '.join(ON_GPU)}; bench/gpu.py measures more there")  # fmt: skip
    parser.add_argument("--part", default="", help="scale, runtime: one of its parts alone")
    parser.add_argument("--long", action="store_true", help="runtime: also what has to be trained, for minutes")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a check that it runs, not a measurement")


def main(args: argparse.Namespace) -> int:
    _choose(args.name, args.device)
    outcome = import_module(f"bench.{args.name}").run(args)
    from burnish.core.provenance import commit

    outcome |= {"targets": BENCHES[args.name], "commit": commit(), "date": datetime.now(UTC).isoformat("T", "seconds")}
    text = json.dumps(outcome, indent=1)
    if args.output:
        from burnish.core.files import write_text

        write_text(Path(args.output), text + "\n")
    if args.json:
        print(text)
    else:
        for figure, value in outcome["figures"].items():
            print(f"{figure:32s} {show(value):>12s}   {BENCHES[args.name].get(figure, '')}")
    return 0


def _choose(name: str, device: str) -> None:
    """Hide a GPU that is not asked for, so that neither is it used nor does its name stand beside a CPU's numbers."""
    from burnish.core.errors import BurnishError

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for one
    elif name not in ON_GPU:
        raise BurnishError(f"bench {name} on a GPU", f"one of {', '.join(ON_GPU)}", f"python -m bench {name}")


def show(value: object) -> str:
    """A figure as it is printed: floats with four digits that count, so that 1.704e-05 is not cut to "1.7042101556".

    >>> show(1.7042101556e-05), show(0.25), show(3), show(True)
    ('1.704e-05', '0.25', '3', 'True')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
