"""DD-VLA's decoder (arXiv 2508.20072, `parallel_decode.py`): tokens are drawn, and some are hidden again.

MaskGIT with a cosine schedule: every pass draws a token at each masked place, and hides again as many places as the
schedule says, those of the least log-probability plus temperature times Gumbel noise, both of which fall over the
passes. With `remask` the tokens of earlier passes compete as well, at their probability now times the share of passes
that is left, as the code does; the paper calls it secondary re-masking.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.sampling.blocks import not_finite
from burnish.sampling.token_model import DECODERS, Decoded, Decoder, Prompt, Stream, TokenModel, sees, visible


@dataclass(frozen=True)
class SampledPlan:
    """Defaults are DD-VLA's, but for `remask`, which its code leaves off too."""

    steps: int = option(12, "forward passes", least=1)
    temperature: float = option(1.0, "of the tokens that are drawn; 0 takes the likeliest", least=0)
    choice_temperature: float = option(1.0, "of the noise on which places stay hidden, in the first pass", least=0)
    remask: bool = option(False, "places of earlier passes may be hidden again")


class SampledDecoder(Decoder):
    """Draws a chunk; what is drawn follows from `Prompt.seeds`, for each sample by itself.

    Args:
        model: a policy trained with MASK.
    """

    draws = True

    def __init__(self, model: TokenModel, plan: SampledPlan):
        if model.mask_id != model.vocabulary:
            raise BurnishError("the policy was trained without a MASK token", "one trained by masked diffusion",
                               "decoder autoregressive")  # fmt: skip
        self.model, self.plan = model, plan

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        model, plan, num, device = self.model, self.plan, len(prompt.states), prompt.states.device
        seeds = [0] * num if prompt.seeds is None else prompt.seeds.tolist()
        random = [torch.Generator().manual_seed(seed) for seed in seeds]
        known, mask_id = prefix.shape[1], model.vocabulary  # as checked
        ids = torch.full((num, model.length), mask_id, device=device)
        ids[:, :known] = prefix
        unmasked, unknown = torch.zeros_like(ids), model.length - known
        passes = min(plan.steps, unknown)
        logits_of, positions = self._passes(prompt)
        for number in range(1, passes + 1):
            logits = logits_of(ids)
            drawn, chance = self._draw(logits, random)
            masked = ids == mask_id
            if not plan.remask:
                chance = chance.masked_fill(~masked, torch.inf)
            else:
                now = logits.softmax(-1).gather(2, ids.clamp_max(model.vocabulary - 1)[..., None])[..., 0]
                chance = torch.where(masked, chance, now * (1 - number / passes))
            chance[:, :known] = torch.inf
            ids = torch.where(masked, drawn, ids)
            unmasked = torch.where(masked, number, unmasked)
            if number < passes:
                count = max(1, min(unknown - 1, math.floor(unknown * math.cos(math.pi / 2 * number / passes) + 5e-7)))
                noise = plan.choice_temperature * (1 - number / passes) * _gumbel(chance.shape[1:], random).to(chance)
                least = (chance.clamp_min(1e-20).log() + noise).argsort(dim=-1, stable=True)[:, :count]
                ids = ids.scatter(1, least, mask_id)
        if stream is not None:
            stream(goal // model.step_length, ids.clone())
        return Decoded(ids, passes=passes, positions=positions(passes), unmasked=unmasked, host_syncs=passes)

    def _passes(self, prompt: Prompt) -> tuple[Any, Any]:
        """ids [B, L] to logits [B, L, V], the prompt computed once where it may be; and positions of so many passes."""
        model, (num, size) = self.model, prompt.valid.shape
        slots = torch.arange(model.length, device=prompt.valid.device)
        mask = visible(prompt.valid, sees(slots[:, None], slots[None], model.block))
        cache = model.empty(prompt)
        begun: list[bool] = []

        def logits_of(ids: Tensor) -> Tensor:
            if model.prompt_sees_actions or not begun:
                begun.append(True)
                logits = model.whole(prompt, ids, mask, cache, see_actions=model.prompt_sees_actions)
            else:
                logits = model.extend(ids, slots.expand(num, -1), mask, cache)
            if model.shift:
                logits = torch.cat((cache.prompt_logits[:, None], logits[:, :-1]), 1)
            if not bool(torch.isfinite(logits).all()):
                raise not_finite(len(begun))
            return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

        repeats = model.prompt_sees_actions
        return logits_of, lambda passes: passes * model.length + size * (passes if repeats else min(passes, 1))

    def _draw(self, logits: Tensor, random: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """An id for every place, [B, L], and its probability."""
        if self.plan.temperature:
            noisy = logits / self.plan.temperature + _gumbel(logits.shape[1:], random).to(logits)
        else:
            noisy = logits
        drawn = noisy.argmax(-1)
        return drawn, logits.softmax(-1).gather(2, drawn[..., None])[..., 0]


def _gumbel(shape: torch.Size, random: list[torch.Generator]) -> Tensor:
    """[B, ...] Gumbel noise, a generator for each sample."""
    uniform = torch.stack([torch.rand(shape, generator=one, dtype=torch.float64) for one in random])
    return -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()


@DECODERS.register("dd_vla")
def dd_vla(model: TokenModel, **options: Any) -> SampledDecoder:
    """Tokens drawn in 12 passes by a cosine schedule; `remask` hides doubtful ones again."""
    return SampledDecoder(model, read_options(SampledPlan, options, "decoder dd_vla"))
