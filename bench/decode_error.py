"""Time at equal error: a small token policy learns two-handed reaching, then every decoder runs at several passes.

Each observation has a target and an obstacle that is passed on the left or on the right, as likely as not. Both are
right; a chunk that begins on one side and ends on the other occurs in no demonstration. So the argmax of every token by
itself is a chunk that cannot be, and decoders differ in how often they write one.
"""

import statistics
import sys
from typing import Any

STEPS, DIMS, BINS, PROMPT, BATCH = 8, 4, 32, 16, 64
SIZE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip
PASSES = (1, 2, 3, 4, 6, 8, 12)
CLOSE = 1.1
"""A plan whose error is within this factor of the best counts as good as it."""


def chunks(states: Any, side: Any):
    """Actions [B, T, A] of observations [B, 2, D] for a side of +-1 [B]: towards a target, round an obstacle."""
    import torch

    time = torch.linspace(0, 1, STEPS)[None, :, None]
    target = torch.tanh(states[:, 0, None, :DIMS])
    bow = 0.5 * side[:, None, None] * torch.sin(torch.pi * time) * (1 + 0.5 * torch.tanh(states[:, 1, None, :DIMS]))
    return (0.6 * time * target + bow).clamp(-1, 1)


def train(blocks: bool, steps: int, device: str, dtype: Any):
    """A policy of `steps` steps on fresh data; returns its TokenModel and its tokenizer."""
    import torch

    from bench.decode import random_models
    from burnish.policies.discrete.losses import NOISE, cross_entropy, hide
    from burnish.sampling.token_model import Prompt, sees, visible

    causal, whole = random_models(DIMS, STEPS, SIZE, device, torch.float32, bins=BINS)
    model = causal if blocks else whole
    net, draws = model.net.requires_grad_(True).train(), torch.Generator(device).manual_seed(1)
    slots = torch.arange(model.length, device=device)
    seen = sees(slots[:, None], slots[None], model.block)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(steps):
        states, side = observations(BATCH, draws, device)
        ids = net.tokens.encode(chunks(states[:, :2].cpu(), side.cpu()).to(device))
        noise = "sorted" if blocks else "uniform"
        hidden, learned = hide(NOISE.get(noise)(BATCH, STEPS, draws), DIMS, draws)
        valid = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
        given, prompt = torch.where(hidden, model.mask_id, ids), Prompt(states, valid)
        joint = net.joint(prompt, given, slots.expand_as(ids), visible(valid, seen))
        loss = (cross_entropy(net.head(joint[:, PROMPT:]), ids) * learned).sum() / learned.sum()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    net.eval().requires_grad_(False).to(dtype)
    return model, net.tokens


def observations(count: int, draws: Any, device: str):
    """Prompts [count, P, D], whose first two positions say target and obstacle, and a side of +-1 for each."""
    import torch

    states = torch.zeros(count, PROMPT, SIZE["hidden_size"], device=device)
    states[:, :2, :DIMS] = torch.randn(count, 2, DIMS, generator=draws, device=device)
    side = torch.randint(0, 2, (count,), generator=draws, device=device) * 2.0 - 1
    return states, side


def measure(device: str, dtype: Any, quick: bool = False) -> dict[str, Any]:
    """ "figures", and for each plan: token_error (to the nearer of both true chunks), mixed, passes, ms."""
    import torch
    from tqdm import tqdm

    from burnish.sampling.timing import run_once
    from burnish.sampling.token_model import Prompt, make_decoder

    steps, count, repeats = (60, 32, 2) if quick else (500, 256, 9)
    print("python -m bench decode: a policy to measure errors with", file=sys.stderr)
    (whole, tokens), (causal, _) = train(False, steps, device, dtype), train(True, steps, device, dtype)
    plans = {f"prompt_cached {n}": (whole, "prompt_cached", {"steps": n}) for n in PASSES}
    plans |= {"confidence": (whole, "confidence", {}), "one_pass": (whole, "one_pass", {})}
    plans |= {f"together {n}": (causal, "together", {"threshold": n}) for n in (0.5, 0.9)}
    plans |= {"d2f": (causal, "d2f", {}), "pipelined": (causal, "pipelined", {}), "auto": (causal, "auto", {})}
    plans["sequential"] = (causal, "sequential", {})
    draws = torch.Generator(device).manual_seed(2)
    states, _ = observations(count, draws, device)
    valid = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
    true = torch.stack([tokens.encode(chunks(states[:, :2].cpu(), torch.full((count,), side)).to(device))
                        for side in (-1.0, 1.0)])  # fmt: skip
    made = {name: make_decoder(kind, model, **options) for name, (model, kind, options) in plans.items()}
    alone, found = Prompt(states[:1].to(dtype), valid[:1]), {}
    for name, decoder in made.items():
        decoded = decoder(Prompt(states.to(dtype), valid))
        other = (decoded.ids != true).float()  # [2, B, L]
        off = (
            (tokens.decode(decoded.ids) - tokens.decode(true.flatten(0, 1)).view(2, count, STEPS, DIMS)).abs().mean(-1)
        )
        nearer = off[0] < off[1]  # [B, T], which side each step is on; ends are alike
        inner = nearer[:, 2:-2]
        found[name] = {
            "token_error": float(other.mean(-1).amin(0).mean()), "passes": float(decoder(alone).passes),
            "mixed": float((inner.any(1) & ~inner.all(1)).float().mean()), "ms": [],
        }  # fmt: skip
    for _ in tqdm(range(repeats), desc="rounds", file=sys.stderr, leave=False):
        for name, decoder in made.items():
            found[name]["ms"].append(run_once(decoder, alone))
    for row in found.values():
        row["ms"] = statistics.median(row["ms"])
    return {"figures": figures(found), "plans": found, "training_steps": steps, "observations": count}


def figures(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each family's fastest plan among those whose error is within CLOSE of the best of all."""
    limit = CLOSE * min(row["token_error"] for row in found.values()) + 1e-9
    baselines = [name for name in found if name.startswith(("prompt_cached", "confidence", "one_pass"))]

    def fastest(names: list[str]) -> dict[str, float]:
        good = [found[name] for name in names if found[name]["token_error"] <= limit]
        return min(good or [min((found[name] for name in names), key=lambda row: row["token_error"])],
                   key=lambda row: row["ms"])  # fmt: skip

    ours, theirs = fastest([name for name in found if name not in baselines]), fastest(baselines)
    return {
        "equal_error_prompt_cached_over_ours": theirs["ms"] / ours["ms"],
        "equal_error_passes_ours": ours["passes"], "equal_error_passes_prompt_cached": theirs["passes"],
        "mixed_share_one_pass": found["one_pass"]["mixed"], "mixed_share_together": found["together 0.5"]["mixed"],
        "mixed_share_d2f": found["d2f"]["mixed"],
    }  # fmt: skip
