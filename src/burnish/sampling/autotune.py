"""A plan chosen on the user's own device: exact decoders race on the first prompt, and the fastest one stays."""

import statistics
from dataclasses import replace
from typing import Any

from torch import Tensor

from burnish.sampling.blocks import BlockDecoder, preset_values
from burnish.sampling.plan import DecodePlan, make_plan
from burnish.sampling.timing import run_once
from burnish.sampling.token_model import DECODERS, Decoded, Decoder, Prompt, Stream, TokenModel

APPENDS = (2, 4)
"""Blocks opened before one pass, beside 1 and all of them."""
WIDEST = 16
"""Blocks of up to so many of the model's own."""
CLOSE = 1.3
"""After the first round only those within this factor of the best go on."""


class AutoDecoder(Decoder):
    """Races plans that keep the rule (threshold, minimum unmasked) and differ in block width and in blocks at once.

    The choice is made at the first call with a new shape of prompt and kept; it follows from times, so two runs may
    decide differently. `chosen` holds it; name that plan to repeat a run exactly.

    Args:
        model: the policy.
        plan: the rule; `block` and `append` are chosen.
        preset: name of the rule, for `chosen`.
        repeats: timed decodes of each plan in the final.

    Raises:
        BurnishError: the plan does not fit the model.
    """

    def __init__(self, model: TokenModel, plan: DecodePlan, preset: str, repeats: int = 3):
        self.model, self.repeats = model, repeats
        self.decoders = {describe(p, preset): BlockDecoder(model, p) for p in candidates(model, plan)}
        self.chosen: dict[tuple, str] = {}
        self.times: dict[tuple, dict[str, float]] = {}

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        key = (tuple(prompt.states.shape), prompt.states.dtype, str(prompt.states.device))
        if key not in self.chosen:
            self.times[key] = race(self.decoders, prompt, self.repeats)
            self.chosen[key] = min(self.times[key], key=self.times[key].__getitem__)
        decoded = self.decoders[self.chosen[key]].decode(prompt, prefix, goal, stream)
        decoded.detail["plan"] = self.chosen[key]
        return decoded


def candidates(model: TokenModel, plan: DecodePlan) -> list[DecodePlan]:
    """Plans with other block widths and numbers of blocks at once that fit the model.

    Raises:
        BurnishError: the rest of the plan does not fit.
    """
    unit = model.step_length if model.block == 1 else model.block
    num = model.length // unit
    plans = []
    for width in [w for w in range(1, WIDEST + 1) if num % w == 0]:
        count = num // width
        appends = sorted({min(append, count) for append in (1, *APPENDS, count)})
        plans += [replace(plan, block=unit * width, append=append).fit(model) for append in appends]
    return plans


def describe(plan: DecodePlan, preset: str) -> str:
    """A plan's choice in words that `--option` of the decoder `pipelined` takes."""
    return f"preset={preset} block={plan.block} append={plan.append}"


def race(decoders: dict[str, BlockDecoder], prompt: Prompt, repeats: int) -> dict[str, float]:
    """Milliseconds by name of the plans that were tried.

    First every width with one block at a time and with all of them, then the two best widths with numbers between;
    those close to the best are timed in turns, so that a slow moment of the machine affects them alike.
    """
    times: dict[str, float] = {}

    def attempt(names: list[str]) -> None:
        for name in names:
            decoders[name](prompt)  # warms up, compiles, captures
            times[name] = run_once(decoders[name], prompt)

    plans = {name: decoder.plan for name, decoder in decoders.items()}
    attempt([name for name, plan in plans.items() if plan.append in (1, decoders[name].model.length // plan.block)])
    best = {plans[name].block for name in sorted(times, key=times.__getitem__)[:2]}
    attempt([name for name, plan in plans.items() if plan.block in best and name not in times])
    limit = CLOSE * min(times.values())
    final = {name: [time] for name, time in times.items() if time <= limit}
    for _ in range(repeats):
        for name, seen in final.items():
            seen.append(run_once(decoders[name], prompt))
    return times | {name: statistics.median(seen) for name, seen in final.items()}


@DECODERS.register("auto")
def auto(model: TokenModel, preset: str = "together", repeats: int = 3, **options: Any) -> AutoDecoder:
    """The fastest on this device of the exact block decoders with the rule of `preset`."""
    return AutoDecoder(model, make_plan(preset_values(preset), options), preset, repeats)
