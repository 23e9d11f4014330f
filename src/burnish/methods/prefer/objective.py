"""The `prefer` objective: wires pairs, scores, reference and loss to a run."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.seeding import derive_seed
from burnish.core.types import Batch, PolicyLoss
from burnish.data.pairs import PairData
from burnish.methods import reference
from burnish.methods.objective import OBJECTIVES, Objective, Run
from burnish.methods.prefer import losses
from burnish.methods.prefer.draws import ScoreConfig, margin_error
from burnish.methods.prefer.options import PreferConfig, make_config
from burnish.methods.prefer.scoring import counts, pair_draws, policy_seeds, reference_scores, reference_seeds, weighted
from burnish.policies.base import Policy, require

log = logging.getLogger("burnish")


@OBJECTIVES.register("prefer")
class Prefer(Objective):
    """Preference optimisation on pairs of chunks (CrossVLA, arXiv:2605.21854, with what its code leaves out).

    Set `train.imitation_weight` to 0 to train on preferences alone; above 0 the demonstrations anchor the policy.

    Args:
        preset: default, plain_dpo, paper, released_code or diffusion_dpo.
        **options: fields of PreferConfig on top of the preset; `score` is a mapping of ScoreConfig's.
    """

    def __init__(self, preset: str = "default", **options: Any):
        super().__init__()
        self.config: PreferConfig = make_config(preset, options)
        self._step, self._micro = -1, 0
        self._sums: dict[str, Tensor] = {}
        self._seen = 0
        self._warned: set[str] = set()

    def setup(self, run: Run) -> None:
        config = self.config
        if config.loss != "clone":
            require(run.policy, "score", "prefer")
        self.data = PairData(
            Path(config.pairs), run.policy.cameras, run.policy.chunk_size, image_size=run.recipe.data.image_size,
            cache_dir="", steps=config.steps, progress=run.progress,
        )  # fmt: skip
        self.data.check_units(run.data.meta.stats["action"])
        self.score = score_config(run.policy, config.score)
        self._warns = run.accelerator.is_main_process
        self.dropouts = reference.dropouts(run.policy)
        reference.check_precision(run.policy)
        if config.reference == "adapter_off":
            reference.check_adapters(run.policy)
        if config.reference == "cached" and config.loss != "clone":
            with run.accelerator.main_process_first(), reference.without_dropout(self.dropouts):
                self.cache = self._cached_reference(run)

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        random = self._random(run)
        if self.config.loss == "clone":
            rows = self.data.successes[random.integers(len(self.data.successes), size=self.config.batch_size)]
            imitated = _to(self.data.demonstrations(rows), run.device)
            draws = run.policy.draw(len(rows), run.generator)
            return {"prefer": self.config.weight * run.policy.loss(imitated, draws).total}
        ids = random.integers(len(self.data), size=self.config.batch_size)
        slots = random.integers(self.config.pool, size=self.config.batch_size)
        if self.config.reference != "cached":  # nothing is stored, so every step may have draws of its own
            slots = slots + self.config.pool * (1 + run.step)
        return self._preference(run, ids, slots)

    def _preference(self, run: Run, ids: np.ndarray, slots: np.ndarray) -> dict[str, Tensor]:
        config, seed = self.config, run.recipe.train.seed
        pairs, candidates = self.data.batch(ids)
        valid = counts(pairs, candidates).to(run.device)
        pairs, candidates = _to(pairs, run.device), candidates.to(run.device)
        draws = pair_draws(run.policy, self.score, policy_seeds(seed, ids, slots)).to(run.device)
        with reference.without_dropout(self.dropouts):
            before = self._reference(run, ids, slots, pairs, candidates, valid)
            per_draw = run.policy.scores(pairs, candidates, draws.draws)
        now = weighted(per_draw, draws.weight, self.score, valid)
        scores, start = now.mean(-1), None if before is None else before.mean(-1)
        margin = losses.margin(scores, start)
        terms = {"prefer": losses.preference(config.loss, margin, config.beta, config.label_smoothing,
                                             config.horizon).mean() * config.weight}  # fmt: skip
        if config.sft_weight:
            chosen = weighted(per_draw, draws.weight, replace(self.score, reduce="mean"), valid)[:, 0]
            terms["prefer_sft"] = -config.sft_weight * chosen.mean()
        if config.proximal_weight:
            terms["prefer_proximal"] = config.proximal_weight * losses.proximal(scores, start).mean()
        error = margin_error(now.detach() if before is None else now.detach() - before)
        self._note({**losses.diagnose(scores, start, self.scale), "margin_standard_error": error.mean()})
        return terms

    @property
    def scale(self) -> float:
        """What a margin is multiplied by in the logit."""
        return self.config.beta * (self.config.horizon if self.config.loss == "diffusion_dpo" else 1.0)

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call; warns once of each thing that is wrong."""
        if not self._seen:
            return {}
        figures = {name: float(value) / self._seen for name, value in self._sums.items()}
        self._sums, self._seen = {}, 0
        referenced = self.config.reference != "none"
        line = losses.warning(figures, figures["margin_standard_error"], self.scale, referenced)
        kind = line.partition(" ")[2][:20]
        if line and self._warns and kind not in self._warned and self.config.loss != "ipo":
            self._warned.add(kind)
            log.warning("prefer: %s", line)
        return {f"prefer_{name}": value for name, value in figures.items()}

    def _note(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._seen += 1

    def _random(self, run: Run) -> np.random.Generator:
        """Which pairs a micro-batch has follows from seed, rank, step and its place in the step alone."""
        self._micro = self._micro + 1 if run.step == self._step else 0
        self._step = run.step
        rank = run.accelerator.process_index
        return np.random.default_rng(derive_seed(run.recipe.train.seed, "pairs", rank, run.step, self._micro))

    def _reference(self, run: Run, ids, slots, pairs: Batch, candidates: Tensor, valid: Tensor) -> Tensor | None:
        """[B, 2, K] weighted scores of the reference, without gradient; None where there is none."""
        if self.config.reference == "none":
            return None
        if self.config.reference == "cached":
            return self.cache[torch.as_tensor(ids), torch.as_tensor(slots)].to(run.device)
        seeds = reference_seeds(self.score, run.recipe.train.seed, ids, slots)
        draws = pair_draws(run.policy, self.score, seeds).to(run.device)
        with torch.no_grad(), reference.without_adapters(run.policy):
            per_draw = run.policy.scores(pairs, candidates, draws.draws)
        return weighted(per_draw, draws.weight, self.score, valid)

    def _cached_reference(self, run: Run) -> Tensor:
        seed, config = run.recipe.train.seed, self.config
        about = reference.describe(
            format=3, weights=run.parent_hash, data=self.data.hash, draws=self.score, pool=config.pool, seed=seed,
            chunk_size=run.policy.chunk_size, steps=self.data.steps, statistics=run.data.hash,
            image_size=run.recipe.data.image_size, precision=run.accelerator.mixed_precision,
            settings=reference.settings(run.policy),
        )  # fmt: skip
        name = f"reference-{derive_seed(*about.values()):016x}.safetensors"
        path = Path(config.reference_cache) if config.reference_cache else self.data.root / ".scores" / name

        def compute() -> Tensor:
            with run.accelerator.autocast():  # as the policy is scored: rounding must not look like a preference
                return reference_scores(run.policy, self.data, self.score, config.pool, seed, progress=run.progress)

        return reference.cached(path, about, compute)


def score_config(policy: Policy, config: ScoreConfig) -> ScoreConfig:
    """The config as it applies to this policy: times, weights and antithetic noise mean something to flows only.

    A policy whose score is exact needs one draw, which it does not look at.
    """
    if policy.supports("velocity"):
        return config
    draws = 1 if policy.supports("likelihood") else config.draws
    return replace(
        config, draws=draws, times="policy", fixed_times=(), weight="uniform", stratified=False, antithetic=False
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
