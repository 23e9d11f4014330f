"""Ways to decode one chunk, on equal weights in one process: bidirectional and prompt-cached baselines against ours.

Weights are random, so no token is ever confident and every decoder needs its most passes: baselines therefore also run
in as many passes as ours, and time at equal error is taken on a small policy that learns something first
(bench/decode_error.py). Success is the matter of recipes/decode. Vision, alike for all, is left out.
"""

import argparse
import statistics
import sys
from typing import Any

PROMPT = 200
"""Token positions of the prompt: two views of 64 to 100 tokens each, an instruction and a state, as in Dream-VLA."""
CHUNKS = ((7, 1), (7, 8), (7, 50), (10, 64))
"""(action dimension, control steps): 7, 56, 350 and 640 tokens."""
CPU_SIZE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4}  # fmt: skip
"""About 23 million weights: still far below any VLA, but a pass costs what its tokens cost."""
SMALL_SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
"""About 4 million: what surrounds a pass weighs as much as the pass."""
GPU_SIZE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8}  # fmt: skip
"""About 2.8 billion weights, the widths of Llama-3.2-3B; bench/gpu.py takes 7 billion too."""
BINS = 256
ONE_PASS = "one_pass"
FEW = (ONE_PASS, "prompt_cached_equal")
"""Decoders that are asked for fewer passes than their own rule takes."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time every decoder at every length, in turns; and time at equal error.

    Figures:
        bidirectional_over_ours: 56 tokens; full bidirectional (12 passes, DD-VLA's setting) over our `auto` plan.
        bidirectional_over_pipelined, bidirectional_over_one_pass: the same over `pipelined` and over `one_pass`.
        prompt_cached_over_ours: the same with the prompt computed once, the honest baseline.
        long_prompt_cached_over_ours: its smallest value at 350 and 640 tokens.
        first_action_speedup: time until the first control step is final, bidirectional over ours, 56 tokens.
        prompt_cached_equal_passes_over_ours, one_pass_over_ours: 56 tokens; baselines in as many passes as ours, and in
            one. On a GPU, and nearly on a CPU, passes are what counts: about 1 means that blocks save no time here.
        auto_worst_over_best: `auto` over the fastest decoder of all but `one_pass`, which decides no token in the light
            of another one; the worst length. The median over rounds of the quotient of two decodes of one round.
        equal_error_prompt_cached_over_ours, equal_error_passes_ours, equal_error_passes_prompt_cached: a small policy
            that was trained here (see bench.decode_error): milliseconds of the fastest plan of each family whose token
            error is within 10 % of the best of both, and its passes.
        mixed_share_one_pass, mixed_share_together, mixed_share_d2f: share of chunks of that policy that mix two modes
            of its data, which no demonstration does.
        tokens_equal: cached and uncached decodes gave the same tokens in the same passes, at every length, in float64
            (among hundreds of random tokens float32 finds near ties, which rounding then decides).
        small_bidirectional_over_ours, small_first_action_speedup: as above, with a backbone of 4 million weights.
    """
    import torch

    from bench import decode_error
    from burnish.core.provenance import machine

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    chunks = CHUNKS[:2] if args.quick else CHUNKS
    repeats = 2 if args.quick else 5
    detail: dict[str, Any] = {"prompt_rows": PROMPT, "precision": str(dtype), **(GPU_SIZE if gpu else CPU_SIZE)}
    lengths = {}
    for step, steps in chunks:
        print(f"python -m bench decode: {step * steps} tokens", file=sys.stderr)
        lengths[step * steps] = measure(step, steps, GPU_SIZE if gpu else CPU_SIZE, device, dtype, repeats)
    info = machine()
    name = info.pop("device")
    figures = _figures(lengths)
    small = {56: measure(7, 8, SMALL_SIZE, device, dtype, repeats)}
    few = _figures(small)
    figures |= {f"small_{key}": few[key] for key in ("bidirectional_over_ours", "first_action_speedup")}
    detail["small"] = {**SMALL_SIZE, **small[56]}
    errors = decode_error.measure(device, dtype, args.quick)
    figures |= errors.pop("figures")
    detail["error"] = errors
    if gpu:
        figures["pass_over_roofline"] = lengths[56]["pass_over_roofline"]
    detail["lengths"] = lengths
    return {"name": "decode", "device": name, "versions": info, "n": repeats, "figures": figures, "detail": detail}


def _figures(lengths: dict[int, dict[str, Any]]) -> dict[str, float | bool]:
    ms = {length: {name: row["ms"] for name, row in found["decoders"].items()} for length, found in lengths.items()}
    first = {name: row["first_step_ms"] for name, row in lengths[56]["decoders"].items()}
    long = [times["prompt_cached"] / times["auto"] for length, times in ms.items() if length >= 350]
    figures = {
        "bidirectional_over_ours": ms[56]["bidirectional"] / ms[56]["auto"],
        "bidirectional_over_pipelined": ms[56]["bidirectional"] / ms[56]["pipelined"],
        "bidirectional_over_one_pass": ms[56]["bidirectional"] / ms[56][ONE_PASS],
        "prompt_cached_over_ours": ms[56]["prompt_cached"] / ms[56]["auto"],
        "prompt_cached_equal_passes_over_ours": ms[56]["prompt_cached_equal"] / ms[56]["auto"],
        "one_pass_over_ours": ms[56][ONE_PASS] / ms[56]["auto"],
        "first_action_speedup": first["bidirectional"] / min(first["auto"], first["pipelined"]),
        "auto_worst_over_best": max(
            row["auto_over"] for found in lengths.values() for name, row in found["decoders"].items() if name not in FEW
        ),
        "tokens_equal": all(found["tokens_equal"] for found in lengths.values()),
    }
    if long:
        figures["long_prompt_cached_over_ours"] = min(long)
    return figures


def measure(step: int, steps: int, size: dict[str, int], device: str, dtype: Any, repeats: int) -> dict[str, Any]:
    """All decoders at one length.

    Args:
        step: action dimension.
        steps: control steps of a chunk.
        size: LlamaConfig fields of the backbone.
        device: torch device.
        dtype: torch dtype of weights.
        repeats: timed rounds.

    Returns:
        "decoders" (name to ms, p99, first_step_ms, passes, rows, auto_over), "tokens_equal", "auto_plan".
    """
    import torch
    from tqdm import tqdm

    from burnish.sampling.timing import run_streaming
    from burnish.sampling.token_model import make_decoder

    blocks, whole = random_models(step, steps, size, device, dtype)
    draws = torch.Generator().manual_seed(0)
    prompt = _prompt(torch.randn(1, PROMPT, size["hidden_size"], generator=draws).to(device, dtype))
    made = {name: make_decoder(name, blocks) for name in ("pipelined", "sequential")}
    made["auto"] = make_decoder("auto", blocks, budget=1.0)  # equal weights are random: tokens say nothing
    made |= {name: make_decoder("pipelined", blocks, preset=name) for name in ("paper", "together")}
    made |= {name: make_decoder(name, whole) for name in ("bidirectional", "prompt_cached", ONE_PASS)}
    steps_of_ours = made["auto"](prompt).passes  # makes its choice
    made["prompt_cached_equal"] = make_decoder("prompt_cached", whole, steps=steps_of_ours)
    decoded = {name: decoder(prompt) for name, decoder in made.items()}  # warms up
    times: dict[str, list[float]] = {name: [] for name in made}
    firsts: dict[str, list[float]] = {name: [] for name in made}
    for _ in tqdm(range(repeats), desc="rounds", file=sys.stderr, leave=False):
        for name, decoder in made.items():
            total, first = run_streaming(decoder, prompt)
            times[name].append(total)
            firsts[name].append(first)
    rows = {
        name: {
            "ms": statistics.median(times[name]), "p99": max(times[name]),
            "first_step_ms": statistics.median(firsts[name]), "passes": decoded[name].passes,
            "rows": decoded[name].positions,
            "auto_over": statistics.median(a / b for a, b in zip(times["auto"], times[name], strict=True)),
        }
        for name in made
    }  # fmt: skip
    equal = cache_is_exact(step, steps, device)
    found = {"decoders": rows, "tokens_equal": equal, "auto_plan": decoded["auto"].detail["plan"]}
    if device == "cuda":
        found["pass_over_roofline"] = rows["auto"]["ms"] / rows["auto"]["passes"] / _roofline_ms(blocks)
    return found


def cache_is_exact(step: int, steps: int, device: str) -> bool:
    """Whether decoders give the same tokens in the same passes with and without their cache, in float64."""
    import torch

    from burnish.sampling.token_model import make_decoder

    blocks, whole = random_models(step, steps, SMALL_SIZE, device, torch.float64)
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(1, PROMPT, SMALL_SIZE["hidden_size"], generator=draws, dtype=torch.float64).to(device)
    for model, name, options in ((blocks, "pipelined", {}), (blocks, "pipelined", {"preset": "paper"}),
                                (blocks, "sequential", {}), (whole, "prompt_cached", {})):  # fmt: skip
        kept, again = (make_decoder(name, model, cache=cache, **options)(_prompt(states)) for cache in (True, False))
        if not (torch.equal(kept.ids, again.ids) and torch.equal(kept.unmasked, again.unmasked)):
            return False
    return True


def random_models(step: int, steps: int, size: dict[str, int], device: str, dtype: Any, bins: int = BINS):
    """One policy with random weights twice: block-causal over control steps, and bidirectional."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from transformers import LlamaConfig, LlamaModel

    from burnish.core.seeding import seeded
    from burnish.policies.discrete.configuration_discrete import DiscreteConfig
    from burnish.policies.discrete.network import NetTokenModel, TokenNet

    class Backbone(torch.nn.Module):
        """A language model where TokenNet wants a VLM; images never pass through it here."""

        def __init__(self, config: Any):
            super().__init__()
            self.config, self.decoder = config, LlamaModel(config)

        def get_decoder(self) -> Any:
            return self.decoder

        def get_input_embeddings(self) -> Any:
            return self.decoder.embed_tokens

    config = DiscreteConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (step,))},
        chunk_size=steps, n_action_steps=steps, block_size=step, bins=bins, device=device,
    )  # fmt: skip
    with seeded(0, device), torch.device(device):
        net = TokenNet(config, Backbone(LlamaConfig(vocab_size=384, tie_word_embeddings=True, **size)))
    net = net.to(device, dtype).eval().requires_grad_(False)
    blocks, whole = NetTokenModel(net), NetTokenModel(net)
    whole.block = whole.length
    return blocks, whole


def _prompt(states: Any):
    import torch

    from burnish.sampling.token_model import Prompt

    return Prompt(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))


def _roofline_ms(model: Any) -> float:
    """Milliseconds to read all weights of the language model once, at the bandwidth of a measured copy."""
    import torch

    weights = sum(p.numel() * p.element_size() for p in model.net.text_model.parameters())
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    bytes_per_ms = 10 * 2 * source.numel() / begin.elapsed_time(end)
    return weights / bytes_per_ms
