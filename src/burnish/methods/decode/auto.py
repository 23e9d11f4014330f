"""A plan chosen on the user's own device: exact decoders race on the first prompt, and the fastest one stays."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.methods.decode.blocks import PRESETS, BlockDecoder
from burnish.methods.decode.plan import DecodePlan, make_plan
from burnish.methods.decode.timing import run_once
from burnish.policies.rows import DECODERS, Decoded, PromptRows, RowModel, Stream

WIDTHS = (1, 2, 4, 8, 16)
"""Blocks of so many of the model's own."""
APPENDS = (1, 2, 4)
"""Blocks opened before one pass; all of them at once is tried too."""
CLOSE = 1.3
"""After the first round only those within this factor of the best go on."""


class AutoDecoder:
    """Races plans that keep the commit rule (confidence, forced share) and differ in block width and in blocks at once.

    The choice is made at the first call with a new shape of prompt and kept; it follows from times, so two runs may
    decide differently. `chosen` holds it; name that plan to repeat a run exactly.

    Args:
        model: the policy's rows.
        plan: the commit rule; `block` and `append` are chosen.
        repeats: timed decodes of each plan in the final.

    Raises:
        BurnishError: no plan fits the model.
    """

    def __init__(self, model: RowModel, plan: DecodePlan, repeats: int = 3):
        self.model, self.repeats = model, repeats
        self.decoders = {describe(p): BlockDecoder(model, p) for p in candidates(model, plan)}
        self.chosen: dict[tuple, str] = {}
        self.times: dict[tuple, dict[str, float]] = {}

    def __call__(
        self,
        prompt: PromptRows,
        *,
        prefix: Tensor | None = None,
        until: int | None = None,
        stream: Stream | None = None,
    ) -> Decoded:
        key = (tuple(prompt.states.shape), prompt.states.dtype, str(prompt.states.device))
        if key not in self.chosen:
            self.times[key] = race(self.decoders, prompt, self.repeats)
            self.chosen[key] = min(self.times[key], key=self.times[key].__getitem__)
        decoded = self.decoders[self.chosen[key]](prompt, prefix=prefix, until=until, stream=stream)
        decoded.detail["plan"] = self.chosen[key]
        return decoded


def candidates(model: RowModel, plan: DecodePlan) -> list[DecodePlan]:
    """Plans with other block widths and numbers of blocks at once that fit the model.

    Raises:
        BurnishError: none does.
    """
    unit = model.step_length if model.block == 1 else model.block
    widths = [unit * width for width in WIDTHS if model.length % (unit * width) == 0]
    if model.length not in widths and model.length % unit == 0:
        widths.append(model.length)
    plans = []
    for block in widths:
        num = model.length // block
        for append in sorted({min(append, num) for append in (*APPENDS, num)}):
            plans.append(replace(plan, block=block, append=append).fit(model))
    if not plans:
        raise BurnishError(f"no block width fits {model.length} tokens in blocks of {unit}")
    return plans


def describe(plan: DecodePlan) -> str:
    """A plan's choice in words that `--option` takes."""
    return f"block={plan.block} append={plan.append}"


def race(decoders: dict[str, BlockDecoder], prompt: PromptRows, repeats: int) -> dict[str, float]:
    """Milliseconds by name; the slow ones keep the time of the first round.

    Rounds go through all that are left in turn, so that a slow moment of the machine strikes them alike.
    """
    times = {}
    for name, decoder in decoders.items():
        decoder(prompt)  # warms up, compiles, captures
        times[name] = run_once(decoder, prompt)
    best = min(times.values())
    final: dict[str, list[float]] = {name: [time] for name, time in times.items() if time <= CLOSE * best}
    for _ in range(repeats):
        for name, seen in final.items():
            seen.append(run_once(decoders[name], prompt))
    for name, seen in final.items():
        times[name] = float(torch.tensor(seen).median())
    return times


@DECODERS.register("auto")
def auto(model: RowModel, preset: str = "fast", repeats: int = 3, **options: Any) -> AutoDecoder:
    """The fastest of the exact block decoders on this device."""
    if preset not in PRESETS:
        raise BurnishError(f"unknown preset '{preset}'", f"one of {', '.join(PRESETS)}")
    return AutoDecoder(model, make_plan(PRESETS[preset], options), repeats)
