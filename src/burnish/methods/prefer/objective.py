"""The `prefer` objective: wires pairs, scores, reference and loss to a run."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import alone
from burnish.core.reading import read_object
from burnish.core.seeding import derive_seed
from burnish.core.types import Batch, PolicyLoss
from burnish.data.loader import to_device
from burnish.data.pairs import FACTS, OutcomeData, PairData, PairFolder
from burnish.methods import reference
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run
from burnish.methods.prefer import losses, scoring
from burnish.methods.prefer.draws import margin_error
from burnish.methods.prefer.options import PreferConfig, make_config
from burnish.methods.prefer.scoring import (
    counts,
    pair_draws,
    policy_seeds,
    reference_scores,
    reference_seeds,
    score_config,
    weighted,
)
from burnish.policies.base import Policy, require

log = logging.getLogger("burnish")


@OBJECTIVES.register("prefer")
class Prefer(Objective):
    """Preference optimisation on pairs of chunks (CrossVLA, arXiv:2605.21854, with what its code leaves out), or on
    single ones and how their episodes ended (KTO).

    Set `train.imitation_weight` to 0 to train on preferences alone; above 0 the demonstrations anchor the policy.

    Args:
        preset: default, plain_dpo, paper, released_code or diffusion_dpo.
        **options: fields of PreferConfig on top of the preset; `score` is a mapping of ScoreConfig's.
    """

    def __init__(self, preset: str = "default", **options: Any):
        super().__init__()
        self.config: PreferConfig = make_config(preset, options)
        self._step, self._micro = -1, 0
        self._sums: dict[str, Tensor | float] = {}
        self._seen = 0
        self._warned: set[str] = set()
        self._held: scoring.HeldOut | None = None
        self._held_figures: dict[str, float] = {}

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """The pairs of a forward pass; of a pair the observation is encoded once."""
        return Extra(fixed=self.config.batch_size)

    def setup(self, run: Run) -> None:
        config = self.config
        if config.loss != "clone":
            require(run.policy, "score", "prefer")
        self.data = self._open(run)
        self.data.check_units(run.data.meta.stats["action"])
        self.score = score_config(run.policy, config.score)
        self._warns = run.accelerator.is_main_process
        self.dropouts = reference.dropouts(run.policy)
        reference.check_precision(run.policy)
        if config.reference == "adapter_off":
            reference.check_adapters(run.policy)
        if config.reference == "cached" and config.loss != "clone":
            with reference.without_dropout(self.dropouts):
                self.cache = self._cached_reference(run)
        if isinstance(self.data, PairData):
            self.trained_on, held = scoring.split(self.data.pairs, config.held_out)
            episodes = {side[0] for i in held for side in (self.data.pairs[i].chosen, self.data.pairs[i].rejected)}
            cut = np.isin(self.data.robot.episode_index[self.data.successes], sorted(episodes))
            self.data.successes = self.data.successes[~cut]
            if len(held) and run.policy.supports("score"):
                with run.accelerator.autocast(), reference.without_dropout(self.dropouts):
                    self._held = scoring.HeldOut(run.policy, self.data, held)

    def _open(self, run: Run) -> PairFolder:
        options: dict[str, Any] = {
            "image_size": run.recipe.data.image_size, "cache_gb": run.recipe.data.cache_gb,
            "seen": run.policy.input_size, "window": run.policy.window, "steps": self.config.steps,
            "progress": run.progress,
        }  # fmt: skip
        facts = Path(self.config.pairs) / FACTS
        unpaired = self.config.loss == "clone" and not (facts.is_file() and read_object(facts).get("pairs"))
        kind: Any = PairFolder if unpaired else OutcomeData if self.config.loss == "kto" else PairData
        if kind is OutcomeData:
            options["every"] = run.policy.n_action_steps
        data = kind(Path(self.config.pairs), run.policy.cameras, run.policy.chunk_size, **options)
        if not len(data.successes):
            raise BurnishError(f"prefer: {self.config.pairs} has no success to imitate", "at least one")
        return data

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        config, random = self.config, self._random(run)
        if self._micro == 0 and run.step % scoring.EVERY == 0:
            self.end(run)
        if config.loss == "clone":
            rows = self.data.successes[random.integers(len(self.data.successes), size=config.batch_size)]
            imitated = to_device(self.data.demonstrations(rows), run.device)
            draws = run.policy.draw(len(rows), run.generator)
            return {"prefer": config.weight * run.policy.loss(imitated, draws).total}
        if config.loss == "kto":  # as many of either kind
            kinds = [np.flatnonzero(self.data.desirable), np.flatnonzero(~self.data.desirable)]
            halves = [-(-config.batch_size // 2), config.batch_size // 2]
            ids = np.concatenate([k[random.integers(len(k), size=n)] for k, n in zip(kinds, halves, strict=True)])
        else:
            ids = self.trained_on[random.integers(len(self.trained_on), size=config.batch_size)]
        slots = random.integers(config.pool, size=config.batch_size)
        if config.reference != "cached":  # nothing is stored, so every step may have draws of its own
            slots = slots + config.pool * (1 + run.step)
        return self._preference(run, ids, slots)

    def end(self, run: Run) -> None:
        """What is held out is scored without gradient, at the end and every so often before."""
        if self._held is not None:
            with run.accelerator.autocast(), reference.without_dropout(self.dropouts):
                self._held_figures = self._held.figures(run.policy)

    def _preference(self, run: Run, ids: np.ndarray, slots: np.ndarray) -> dict[str, Tensor]:
        config, seed = self.config, run.recipe.train.seed
        pairs, candidates = self.data.batch(ids)
        valid = counts(pairs, candidates).to(run.device)
        pairs, candidates = to_device(pairs, run.device), candidates.to(run.device)
        draws = pair_draws(run.policy, self.score, policy_seeds(seed, ids, slots)).to(run.device)
        with reference.without_dropout(self.dropouts):
            before = self._reference(run, ids, slots, pairs, candidates, valid)
            per_draw = run.policy.scores(pairs, candidates, draws.draws)
        now = weighted(per_draw, draws.weight, self.score, valid)
        scores, start = now.mean(-1), None if before is None else before.mean(-1)
        if config.loss == "kto":
            chosen = torch.from_numpy(self.data.desirable[ids]).to(run.device)
            terms = {"prefer": self._unpaired(scores - start, chosen)}
        else:
            chosen = torch.ones(len(ids), dtype=torch.bool, device=run.device)
            margin = losses.margin(scores, start)
            terms = {"prefer": losses.preference(config.loss, margin, config.beta, config.label_smoothing,
                                                 config.horizon).mean() * config.weight}  # fmt: skip
            error = margin_error(now.detach() if before is None else now.detach() - before)
            self._note({**losses.diagnose(scores, start, self.scale), "margin_standard_error": error.mean()})
        if config.sft_weight:
            imitated = weighted(per_draw, draws.weight, replace(self.score, reduce="mean"), valid)[:, 0]
            terms["prefer_sft"] = -config.sft_weight * imitated[chosen].mean()
        if config.proximal_weight:
            terms["prefer_proximal"] = config.proximal_weight * losses.proximal(scores, start).mean()
        return terms

    def _unpaired(self, change: Tensor, desirable: Tensor) -> Tensor:
        """The loss of single chunks: changes [B, 2] of their own scores and of those of chunks from elsewhere."""
        drift = change[:, 1].detach().mean()
        own = change[:, 0].detach()
        self._note({"desirable": own[desirable].mean(), "undesirable": own[~desirable].mean(), "drift": drift})
        return losses.kto(change[:, 0], desirable, self.config.beta, drift).mean() * self.config.weight

    @property
    def scale(self) -> float:
        """What a margin is multiplied by in the logit."""
        return self.config.beta * (self.config.horizon if self.config.loss == "diffusion_dpo" else 1.0)

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, and what was held out at last; warns once of each thing wrong."""
        held = {f"prefer_{name}": value for name, value in self._held_figures.items()}
        if not self._seen:
            return held
        figures = {name: float(value) / self._seen for name, value in self._sums.items()}
        self._sums, self._seen = {}, 0
        if "margin" in figures:
            referenced = self.config.reference != "none"
            line = losses.warning(figures, figures["margin_standard_error"], self.scale, referenced)
            kind = line.partition(" ")[2][:20]
            if line and self._warns and kind not in self._warned and self.config.loss != "ipo":
                self._warned.add(kind)
                log.warning("prefer: %s", line)
        return {**{f"prefer_{name}": value for name, value in figures.items()}, **held}

    def get_extra_state(self) -> dict[str, Any]:
        """What no row has yet, and what was held out at last: a resumed run logs both."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"sums": sums, "seen": self._seen, "held": self._held_figures}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._sums, self._seen, self._held_figures = state["sums"], state["seen"], state["held"]

    def _note(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._seen += 1

    def _random(self, run: Run) -> np.random.Generator:
        """Which pairs a micro-batch has follows from seed and its number alone."""
        self._micro = self._micro + 1 if run.step == self._step else 0
        self._step = run.step
        return np.random.default_rng(derive_seed(run.recipe.train.seed, "pairs", 0, run.number, 0))

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
        facts = {
            "format": 3, "weights": run.parent_hash, "data": self.data.hash, "draws": self.score, "pool": config.pool,
            "seed": seed, "chunk_size": run.policy.chunk_size, "steps": self.data.steps, "statistics": run.data.hash,
            "image_size": run.recipe.data.image_size, "seen": run.policy.input_size,
            "precision": run.accelerator.mixed_precision, "settings": reference.settings(run.policy),
        }  # fmt: skip
        about = {key: str(value) for key, value in facts.items()}  # as a safetensors header holds them
        name = f"reference-{derive_seed(*about.values()):016x}.safetensors"
        path = Path(config.reference_cache) if config.reference_cache else self.data.root / ".scores" / name

        def compute() -> Tensor:
            with run.accelerator.autocast():  # as the policy is scored: rounding must not look like a preference
                return reference_scores(run.policy, self.data, self.score, config.pool, seed, progress=run.progress)

        with alone(path.parent):  # not a barrier of ranks, which has a time limit
            return reference.cached(path, about, compute)
