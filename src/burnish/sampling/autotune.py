"""A plan chosen on the user's own device: plans that write nearly the careful one's tokens race on the first prompt."""

import statistics
from dataclasses import replace
from typing import Any

from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import number
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
CAREFUL: dict[str, Any] = {
    "add": 0.1, "act": 1.0, "append": 1, "min_unmasked": "one", "ties": "first", "threshold": 0.9,
}  # fmt: skip
"""The plan that is always allowed: of the tokens that a pass unmasks together at most one is unsure."""


class AutoDecoder(Decoder):
    """Races plans of the rule (threshold, minimum unmasked) that differ in block width and in blocks at once.

    Such plans write different tokens. The reference unmasks one token a pass; a plan whose tokens differ from it in a
    larger share than `budget` on the first prompt does not race, and where none is left the plan CAREFUL stays. The
    choice is made at the first call with a new shape of prompt and kept; it follows from times, so two runs may decide
    differently. `chosen` holds it; name that plan to repeat a run exactly.

    Args:
        plan: the rule; `block` and `append` are chosen.
        preset: name of the rule, for `chosen`.
        repeats: timed decodes of each plan in the final.
        budget: share of tokens that may differ from one token a pass; 1 chooses by time alone.

    Attributes:
        chosen, times, errors: by shape of prompt: the plan's name; milliseconds and shares of other tokens by name.
    """

    carries = True

    def __init__(self, model: TokenModel, plan: DecodePlan, preset: str, repeats: int = 3, budget: float = 0.05):
        if not number(budget) or not 0 <= budget <= 1 or type(repeats) is not int or repeats < 1:
            raise BurnishError(f"decoder auto: budget {budget!r}, repeats {repeats!r}",
                               "a share of tokens, 0 to 1, and a whole number of at least 1")  # fmt: skip
        self.model, self.repeats, self.budget = model, repeats, budget
        self.plans = {describe(p, preset): p for p in candidates(model, plan)}
        careful = replace(plan, block=_unit(model), **CAREFUL).fit(model)
        said = " ".join(f"{name}={value}" for name, value in CAREFUL.items() if name != "append")
        self.plans[f"{describe(careful, preset)} {said}"] = careful
        self.draws = careful.order == "random"
        self.chosen: dict[tuple, str] = {}
        self.times: dict[tuple, dict[str, float]] = {}
        self.errors: dict[tuple, dict[str, float]] = {}
        self._kept: dict[str, BlockDecoder] = {}

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        key = (tuple(prompt.states.shape), prompt.states.dtype, str(prompt.states.device))
        if key not in self.chosen:
            self._choose(key, prompt)
        decoded = self._kept[self.chosen[key]].decode(prompt, prefix, goal, stream)
        decoded.detail["plan"] = self.chosen[key]
        return decoded

    def _choose(self, key: tuple, prompt: Prompt) -> None:
        """Race on `prompt`; buffers, caches and graphs of all but the chosen plan are freed."""
        *others, careful = self.plans
        racing, self.errors[key] = others, {}
        if self.budget < 1:
            one_by_one = replace(self.plans[careful], threshold=1.01, add=1.0)
            truth = BlockDecoder(self.model, one_by_one)(prompt).ids
            for name in others:
                found = BlockDecoder(self.model, self.plans[name])(prompt).ids
                self.errors[key][name] = float((found != truth).float().mean())
            racing = [name for name in others if self.errors[key][name] <= self.budget] or [careful]
        decoders = {name: self._kept.get(name) or BlockDecoder(self.model, self.plans[name]) for name in racing}
        self.times[key] = race(decoders, prompt, self.repeats)
        best = min(self.times[key], key=self.times[key].__getitem__)
        self.chosen[key], self._kept[best] = best, decoders[best]


def _unit(model: TokenModel) -> int:
    return model.step_length if model.block == 1 else model.block


def candidates(model: TokenModel, plan: DecodePlan) -> list[DecodePlan]:
    """Plans with other block widths and numbers of blocks at once that fit the model."""
    unit = _unit(model)
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
    ends = [name for name, plan in plans.items() if plan.append in (1, decoders[name].model.length // plan.block)]
    attempt(ends or list(plans))
    best = {plans[name].block for name in sorted(times, key=times.__getitem__)[:2]}
    attempt([name for name, plan in plans.items() if plan.block in best and name not in times])
    limit = CLOSE * min(times.values())
    final = {name: [time] for name, time in times.items() if time <= limit}
    for _ in range(repeats):
        for name, seen in final.items():
            seen.append(run_once(decoders[name], prompt))
    return times | {name: statistics.median(seen) for name, seen in final.items()}


@DECODERS.register("auto")
def auto(
    model: TokenModel, preset: str = "together", repeats: int = 3, budget: float = 0.05, **options: Any
) -> AutoDecoder:
    """The fastest on this device of the block decoders with the rule of `preset` that keep to the budget."""
    return AutoDecoder(model, make_plan(preset_values(preset), options), preset, repeats, budget)
