"""What a decoder costs and how far its actions are from true ones: synchronised, warmed up, one at a time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.sampling.token_model import Decoder, Prompt, TokenModel


def measure_decoder(
    decode: Decoder, prompts: list[Prompt], model: TokenModel, *, repeats: int = 1,
    truth: Tensor | None = None, actions: Callable[[Tensor], Tensor] | None = None, padded: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Decode every prompt alone.

    Args:
        prompts: of one observation each.
        repeats: timed decodes of each prompt; one more warms up.
        truth: long [B, L], true tokens of the observations.
        actions: ids [B, L] to normalised actions [B, T, A], for the error.
        padded: bool [B, T], steps beyond the episode, which have no true action; None where there are none.

    Returns:
        ms, p95, p99 of a chunk; first_step_ms until the first control step is final; means of passes (forward passes,
        NFE), rows (token positions fed in them) and host_syncs; left_to_right, Kendall's tau between control step and
        the pass that unmasked it (1: strictly in order of time); action_error and token_error, the mean distance to
        the true actions in normalised units and the share of other tokens, both over steps of
        the episode; ids of the first prompt.
    """
    times, firsts, decoded = [], [], []
    decode(prompts[0])
    for prompt in prompts:
        for _ in range(repeats):
            whole, first = run_streaming(decode, prompt)
            times.append(whole)
            if model.time_ordered:
                firsts.append(first)
        decoded.append(decode(prompt))
    found = {
        "ms": statistics.median(times), "p95": float(np.quantile(times, 0.95)), "p99": float(np.quantile(times, 0.99)),
        "first_step_ms": statistics.median(firsts or times),
        "passes": statistics.fmean(d.passes for d in decoded), "rows": statistics.fmean(d.positions for d in decoded),
        "host_syncs": statistics.fmean(d.host_syncs for d in decoded),
        "left_to_right": statistics.fmean(left_to_right(d.unmasked[0], model.step_length) for d in decoded),
        "n": len(prompts), "ids": decoded[0].ids[0].tolist(),
    }  # fmt: skip
    if truth is not None and actions is not None:
        ids, truth = torch.cat([d.ids for d in decoded]), truth.to(decoded[0].ids.device)
        apart = (actions(ids) - actions(truth)).abs()
        inside = torch.ones_like(apart[..., 0], dtype=torch.bool) if padded is None else ~padded.to(apart.device)
        found["action_error"] = float(apart[inside].mean())
        if model.time_ordered:
            found["token_error"] = float((ids != truth).view(*inside.shape, -1)[inside].float().mean())
    return found


def left_to_right(unmasked: Tensor, step_length: int) -> float:
    """Kendall's tau-b between the control step of a token and the pass that unmasked it; 0 where all came at once."""
    from scipy.stats import kendalltau

    steps = np.arange(len(unmasked)) // step_length
    tau = kendalltau(steps, unmasked.cpu().numpy()).statistic
    return 0.0 if np.isnan(tau) else float(tau)


def run_once(decode: Decoder, prompt: Prompt) -> float:
    _wait(prompt.states.device)
    begin = time.perf_counter()
    decode(prompt)
    _wait(prompt.states.device)
    return 1000 * (time.perf_counter() - begin)


def run_streaming(decode: Decoder, prompt: Prompt) -> tuple[float, float]:
    """Milliseconds of one decode, and until it said that the first control step is final."""
    heard: list[float] = []
    _wait(prompt.states.device)
    begin = time.perf_counter()
    decode(prompt, stream=lambda steps, ids: heard.append(time.perf_counter()))
    _wait(prompt.states.device)
    end = time.perf_counter()
    return 1000 * (end - begin), 1000 * ((heard[0] if heard else end) - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
