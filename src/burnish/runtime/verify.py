"""Which of its promises a policy's runtime keeps here: tiers, samplers, caches; and what old pictures would cost.

Decoding: looks ahead, leaks into the prompt, drifts, shifts; every check runs the model itself, none trusts its config.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.progress import progress_bar
from burnish.core.types import Batch, Window
from burnish.data.dataset import open_named
from burnish.data.loader import RobotData, to_device
from burnish.policies.base import Policy, require
from burnish.policies.keys import IMAGES, STATE, TASK
from burnish.runtime.choose import REFERENCE, compare_samplers
from burnish.runtime.executor import Runtime
from burnish.runtime.observations import observations, split, true_tokens
from burnish.sampling.blocks import BlockDecoder
from burnish.sampling.kept import Kept
from burnish.sampling.plan import DecodePlan, make_plan
from burnish.sampling.token_model import Prompt, TokenCache, TokenModel, dense_mask

CHECKED = ("exact", "fused", "bf16")
"""Tiers; compiling takes minutes."""
AGES = (1, 2, 4, 8)
"""Control steps."""


def verify_runtime(policy: Policy, data: Path | str, *, count: int = 48, noises: int = 4, seed: int = 0,
                   samplers: Sequence[str] = (), progress: bool = True) -> dict[str, Any]:  # fmt: skip
    """`choose.compare_samplers` (the policy's own steps are "sampler" where none keeps to the rule), and:

    "tiers": by name, see `executor.Sampler.compare`. "caches": whether what is found again has the bits of what is
    computed, for the same observation, another state, and another picture. "old_pictures": see `old_pictures`.

    Args, errors: as of `compare_samplers`.
    """
    found = compare_samplers(policy, data, count=count, noises=noises, seed=seed, samplers=samplers, progress=progress)
    found["sampler"] = found["own"] if found["sampler"] == REFERENCE else found["sampler"]
    batch = observations(policy, 3, data, seed)
    found["tiers"] = {tier: Runtime(policy, tier=tier).verify(batch) for tier in CHECKED}
    found["caches"] = cached_bits(policy, batch)
    found["old_pictures"] = old_pictures(policy, data, found["spread"], count, seed)
    return found


def cached_bits(policy: Policy, batch: Batch) -> dict[str, bool]:
    """Whether the exact tier with caches gives its own bits without, for what follows upon `batch`."""
    plain, cached = Runtime(policy), Runtime(policy, kept=Kept())
    draws = policy.draw(len(batch[TASK]), torch.Generator().manual_seed(0))
    picture = next(name for name in batch if name.startswith(IMAGES))
    following = {"same": batch, "state": {**batch, STATE: batch[STATE] + 0.1},
                 "picture": {**batch, picture: batch[picture] * 0.9}}  # fmt: skip
    cached.act(batch, draws)
    return {name: torch.equal(cached.act(one, draws).actions, plain.act(one, draws).actions)
            for name, one in {**following, "again": following["state"]}.items()}  # fmt: skip


@torch.no_grad()
def old_pictures(policy: Policy, data: Path | str, spread: float, count: int, seed: int) -> list[dict[str, float]]:
    """Errors, in units of the policy's spread, of chunks made of pictures some control steps old and the state of now
    ("images"), and of pictures and a state that old ("prefix"), on equal noise; means over observations.
    """
    window = Window((*(-age for age in reversed(AGES)), 0))
    frames = RobotData(Path(data), policy.cameras, policy.chunk_size, count, seed, augmented=False, progress=False,
                       cache_gb=0, window=window, meta=open_named(data))  # fmt: skip
    batch = frames.finish(to_device(frames.raw(0), policy.device), 0)
    runtime, draws = Runtime(policy), policy.draw(count, torch.Generator().manual_seed(seed))

    def chunk(pictures: int, state: int) -> torch.Tensor:
        seen = {name: value[:, pictures] for name, value in batch.items() if name.startswith(IMAGES)}
        raw = runtime.act({**seen, STATE: batch[STATE][:, state], TASK: batch[TASK]}, draws).raw
        return raw[..., : policy.action_dim].float()

    true, rows = chunk(-1, -1), []
    for place, age in zip(range(len(AGES) - 1, -1, -1), AGES, strict=True):
        apart = {"images": chunk(place, -1) - true, "prefix": chunk(place, place) - true}
        rows.append(
            {"age": age, **{k: float(d.square().mean((1, 2)).sqrt().mean() / spread) for k, d in apart.items()}}
        )
    return rows


# Share of the logits' own spread that rounding may move them, by precision of the model.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
THRESHOLDS = (0.3, 0.5, 0.9, 1.01)


@dataclass(frozen=True)
class Check:
    """One answer.

    Args:
        ok: None where it does not apply to this policy.
        worst: the largest deviation found, in units of the logits' (keys') standard deviation, or a count.
        limit: the largest that passes.
        meaning: what it means for the user.
    """

    name: str
    ok: bool | None
    worst: float
    limit: float
    meaning: str


def verify_decode(policy: Policy, *, data: Path | str = "", count: int = 4, options: dict[str, Any] | None = None,
                  double: bool = False, progress: bool = True) -> list[Check]:  # fmt: skip
    """All checks of a token policy, see `check_model`.

    Args:
        policy: a token policy; converted to float64 in place with `double`.
        data: LeRobot data set with true actions; "" takes random images and leaves the shift unchecked.
        options: of the decode plan.
        double: compute in float64, where rounding decides nothing.
    """
    require(policy, "tokens", "verify decode")
    model = policy.token_model()
    batch = observations(policy, count, data)
    truth = true_tokens(policy, batch) if data else None
    if double:
        policy.double()
    with torch.no_grad():
        prompt = model.embed(batch)
    block = model.step_length if model.block == 1 else model.block  # where any would do, those of one control step
    checks = check_model(model, prompt, make_plan({"block": block}, options or {}), truth)
    return list(progress_bar(checks, desc="checks", unit="", leave=False, shown=progress))


class Watched(TokenModel):
    """A model that keeps a log of the tokens it was fed: (ids, positions) of each pass."""

    def __init__(self, model: TokenModel):
        self.model = model
        self.fed: list[tuple[Tensor, Tensor]] = []
        self.cache: TokenCache | None = None
        for name in TokenModel.__annotations__:
            setattr(self, name, getattr(model, name))

    def embed(self, batch):
        return self.model.embed(batch)

    def empty(self, prompt):
        self.cache = self.model.empty(prompt)
        return self.cache

    def whole(self, prompt, ids, visible, cache, **options):
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.fed.append((ids.clone(), positions))
        return self.model.whole(prompt, ids, visible, cache, **options)

    def extend(self, ids, positions, visible, cache, **options):
        self.fed.append((ids.clone(), positions.clone()))
        return self.model.extend(ids, positions, visible, cache, **options)


@torch.no_grad()
def check_model(
    model: TokenModel, prompt: Prompt, plan: DecodePlan | None = None, truth: Tensor | None = None
) -> Iterator[Check]:
    """All checks of a masked policy on a few observations, one by one.

    Args:
        prompt: of a batch of observations, best at least four.
        plan: the plan to check; None takes the defaults.
        truth: long [B, L], the true tokens of those observations; without them the shift is not checked.
    """
    plan = replace(plan or DecodePlan(), compile=False, graph=False)
    if model.prompt_sees_actions:
        plan = replace(plan, cache=False)
    plan = plan.fit(model)
    draws = torch.Generator().manual_seed(0)
    yield look_ahead(model, prompt, draws)
    yield prompt_isolation(model, prompt, draws)
    if plan.cache:
        yield cached_equals_uncached(model, prompt, plan)
        yield cached_once(model, prompt, plan)
    yield monotone(model, prompt, plan)
    yield batch_independence(model, prompt, plan)
    yield shift(model, prompt, truth)


def look_ahead(model: TokenModel, prompt: Prompt, draws: torch.Generator) -> Check:
    """Tokens of later blocks, changed, must not change the logits of a block."""
    name, meaning = "no look-ahead", "a block that sees later ones changes after it was cached: do not cache"
    if model.block == model.length:
        return Check(name, None, 0.0, 0.0, "bidirectional: one block, nothing is later")
    ids = _random_ids(model, prompt, draws)
    limit, worst = TOLERANCE[prompt.states.dtype], 0.0
    logits, _ = _whole(model, prompt, ids)
    for begin in range(model.block, model.length, model.block):
        other = ids.clone()
        other[:, begin:] = _random_ids(model, prompt, draws)[:, begin:]
        worst = max(worst, _apart(_whole(model, prompt, other)[0][:, :begin], logits[:, :begin]))
    return Check(name, worst <= limit, worst, limit, meaning)


def prompt_isolation(model: TokenModel, prompt: Prompt, draws: torch.Generator) -> Check:
    """Keys and values of the prompt must be those of a pass without any action token."""
    name, meaning = "prompt isolation", "a prompt that sees action tokens has new keys at every pass: do not cache"
    if model.prompt_sees_actions:
        return Check(name, None, 0.0, 0.0,
                     "declared: the prompt attends to actions; decoders recompute it in every pass")  # fmt: skip
    size, limit, worst = prompt.valid.shape[1], TOLERANCE[prompt.states.dtype], 0.0
    alone = _whole(model, prompt, _random_ids(model, prompt, draws)[:, :0])[1]
    for _ in range(2):
        cache = _whole(model, prompt, _random_ids(model, prompt, draws))[1]
        for one, other in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
            keep = prompt.valid[:, None, :, None].expand_as(one[:, :, :size])
            worst = max(worst, _apart(one[:, :, :size][keep], other[:, :, :size][keep]))
    return Check(name, worst <= limit, worst, limit, meaning)


def cached_equals_uncached(model: TokenModel, prompt: Prompt, plan: DecodePlan) -> Check:
    """Same tokens in the same passes with and without the cache, at several thresholds."""
    different = 0
    for threshold in THRESHOLDS:
        one = BlockDecoder(model, replace(plan, threshold=threshold))(prompt)
        other = BlockDecoder(model, replace(plan, threshold=threshold, cache=False))(prompt)
        different += int(((one.ids != other.ids) | (one.unmasked != other.unmasked)).any(1).sum())
    # Rounding decides near-ties; in low precision a few chunks may differ because of it.
    limit = 0 if prompt.states.dtype in (torch.float32, torch.float64) else 0.1 * len(THRESHOLDS) * len(prompt.states)
    return Check("cached = uncached", different <= limit, different, limit, "chunks that the cache changes")


def cached_once(model: TokenModel, prompt: Prompt, plan: DecodePlan) -> Check:
    """Cached keys and values are never written again and are those of the clean chunk."""
    watched = Watched(model)
    decoded = BlockDecoder(watched, plan)(prompt)
    cached_at = decoded.detail["blocks"]["cached"]
    again, worst = 0, 0.0
    for number, (_, positions) in enumerate(watched.fed, start=1):
        inside = positions < model.length
        block = positions.clamp_max(model.length - 1) // plan.block
        at = cached_at.gather(1, block)
        again += int((inside & (at > 0) & (at < number)).sum())
    clean = _whole(model, prompt, decoded.ids)[1]
    size = prompt.valid.shape[1]
    cached = (cached_at > 0).repeat_interleave(plan.block, 1)[:, None, :, None]
    kept = watched.cache.keys + watched.cache.values
    for one, other in zip(kept, clean.keys + clean.values, strict=True):
        one, other = one[:, :, size:-1], other[:, :, size:-1]
        worst = max(worst, _apart(one[cached.expand_as(one)], other[cached.expand_as(one)]))
    limit = TOLERANCE[prompt.states.dtype]
    return Check(
        "cached once", again == 0 and worst <= limit, worst, limit, "cached keys against those of the clean chunk"
    )


def monotone(model: TokenModel, prompt: Prompt, plan: DecodePlan) -> Check:
    """An unmasked id never changes, and every pass unmasks at least one token of every unfinished sample."""
    watched, wrong = Watched(model), 0
    decoded = BlockDecoder(watched, plan)(prompt)
    for ids, positions in watched.fed:
        final = torch.cat((decoded.ids, torch.zeros_like(decoded.ids[:, :1])), 1).gather(1, positions)
        wrong += int(((positions < model.length) & (ids != model.mask_id) & (ids != final)).sum())
    for sample in decoded.unmasked:
        wrong += int(sample.max()) - len(set(sample[sample > 0].tolist()))
    return Check("monotone", wrong == 0, wrong, 0, "tokens that changed, and passes that unmasked none")


def batch_independence(model: TokenModel, prompt: Prompt, plan: DecodePlan) -> Check:
    """A sample gets the same tokens alone and among others."""
    together = BlockDecoder(model, plan)(prompt)
    alone = torch.cat([BlockDecoder(model, plan)(one).ids for one in split(prompt)])
    different = int((alone != together.ids).any(1).sum())
    limit = 0 if prompt.states.dtype in (torch.float32, torch.float64) else 0.1 * len(prompt.states)
    return Check("batch independence", different <= limit, different, limit, "chunks that change among others")


def shift(model: TokenModel, prompt: Prompt, truth: Tensor | None) -> Check:
    """Which position predicts a token: true tokens [B, L], masked one by one, by the declared one or by the other."""
    name = "shift"
    if truth is None:
        return Check(name, None, 0.0, 0.0, "needs demonstrations")
    agree = {False: 0, True: 0}
    for position in range(1, model.length):
        other = truth.clone()
        other[:, position] = model.mask_id
        logits = _whole(model, prompt, other)[0]
        for by_one in agree:
            agree[by_one] += int((logits[:, position - int(by_one)].argmax(-1) == truth[:, position]).sum())
    total = truth.numel() - len(truth)
    declared, other = agree[model.shift] / total, agree[not model.shift] / total
    meaning = f"share of true tokens that the other position predicts, less that of the declared one ({declared:.2f})"
    return Check(name, other - declared <= 0.05, other - declared, 0.05, meaning)


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference in standard deviations of `other`."""
    if not one.numel():
        return 0.0
    spread = other.double().std().clamp_min(1e-12)
    return float((one.double() - other.double()).abs().max() / spread)


def _random_ids(model: TokenModel, prompt: Prompt, draws: torch.Generator) -> Tensor:
    """Random action tokens [B, L], a third of them MASK."""
    shape = (len(prompt.states), model.length)
    ids = torch.randint(model.vocabulary, shape, generator=draws)
    ids[torch.rand(shape, generator=draws) < 1 / 3] = model.mask_id
    return ids.to(prompt.states.device)


def _whole(model: TokenModel, prompt: Prompt, ids: Tensor) -> tuple[Tensor, TokenCache]:
    """Logits and cache of one joint pass over everything."""
    cache, size = model.empty(prompt), prompt.valid.shape[1]
    visible = dense_mask(prompt.valid, ids.shape[1], model.block)[:, size:]
    return model.whole(prompt, ids, visible, cache, see_actions=model.prompt_sees_actions), cache
