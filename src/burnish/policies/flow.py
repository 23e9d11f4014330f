"""The four verbs over LeRobot's flow-matching policies; what differs between them is in smolvla.py and pi.py."""

import json
from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.reading import read_object
from burnish.core.types import Batch, Chunk, Draws, PolicyLoss
from burnish.policies.base import Stage
from burnish.policies.keys import ACTION, PAD, TASK
from burnish.policies.parts import FlowParts, flow_parts
from burnish.policies.steered import conditioned, replaced, sample_with, shared, without_gradients
from burnish.policies.vlm import VLMPolicy
from burnish.sampling.solvers import make_solver
from burnish.sampling.steering import Guide, Steering

RTC_FILE = "rtc.json"
"""In the folder of a policy that was trained with delays, which LeRobot's config has no field for."""


class FlowPolicy(VLMPolicy):
    """A LeRobot flow-matching policy with its processors."""

    capabilities = VLMPolicy.capabilities | {"velocity", "prefix", "runtime", "steering"}
    jacobian: Literal["vjp", "identity"] = "vjp"
    """Of steering that leaves it open; "identity" where no row of a chunk sees a later one."""
    tower = "vision_tower"

    @property
    def frozen_parts(self) -> list[nn.Module]:
        """As LeRobot reads its config. What LeRobot freezes beside that for DDP alone is trained by other losses."""
        frozen = self.config.freeze_vision_encoder
        return [self.vlm] if self.config.train_expert_only else [self.vlm.model.get_submodule(self.tower)] * frozen

    # What a family of policies has to say.

    @abstractmethod
    def model_inputs(self, prepared: dict[str, Any]) -> list[Any]:
        """What the model's `forward` and `sample_actions` take first: images, masks, tokens, masks (, state)."""

    @abstractmethod
    def velocities(self, inputs: list[Any], points: Tensor, time: Tensor) -> Tensor:
        """Velocities [B, R, T, A_model] at `points` (same shape) and `time` [B, R]; one encoding of `inputs`."""

    def time_shape(self) -> tuple[float, float, float, float]:
        """alpha, beta, scale, offset of the training times: scale * Beta(alpha, beta) + offset."""
        return 1.5, 1.0, 0.999, 0.001

    def model_actions(self, actions: Tensor) -> Tensor:
        """Normalised actions [B, T, A] as the model is trained on them, still unpadded."""
        return actions

    def policy_actions(self, actions: Tensor) -> Tensor:
        """The inverse of `model_actions`, for sampled actions."""
        return actions

    @property
    @abstractmethod
    def inner(self) -> nn.Module:
        """LeRobot's module that runs language model and expert together."""

    @property
    @abstractmethod
    def expert(self) -> nn.Module:
        """The action expert inside; has `layers`, which LeRobot runs by hand beside those of the language model."""

    def blocks(self) -> list[nn.Module]:
        """As VLMPolicy.blocks; of layers that LeRobot runs by hand, whose own hooks stay silent, the parts it calls."""
        by_hand = {*self.backbone.text_model.layers, *self.expert.layers}
        found: list[nn.Module] = []
        for block in super().blocks():
            found += [*block.self_attn.children(), block.mlp] if block in by_hand else [block]
        return found

    def embed_image(self, image: Tensor) -> Tensor:
        return self.inner.embed_image(image)

    def model_stages(self) -> list[Stage]:
        model = self.policy.model
        return [Stage("vision", self.inner, "embed_image"), Stage("prompt", self.inner, "forward"),
                Stage("pass", model, "denoise_step"), Stage("head", model.action_out_proj, "forward")]  # fmt: skip

    # The verbs.

    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """Flow-matching loss: squared error of the velocity on valid steps and real action dimensions.

        `total` is the mean over all valid entries of the batch, `per_sample` [B] the mean over those of one sample.
        Steps with `action_is_pad` count nothing, for pi0 and pi05 too (LeRobot counts them there); nor do the first
        `draws.delay` ones, which the network sees as they are, at time 0 (training-time action conditioning, Black et
        al., 2512.05964), so that it learns to go on from them.
        """
        errors, valid = self._errors(batch, batch[ACTION], draws)
        summed, counted = errors.sum(dim=(1, 2)), valid.sum(dim=1) * self.action_dim
        total = summed.sum() / counted.sum().clamp_min(1)
        return PolicyLoss(total, summed / counted.clamp_min(1), {"flow": total})

    def score(self, batch: Batch, actions: Tensor, draws: Draws) -> Tensor:
        """[B]: minus the flow loss of `actions`, summed over steps and dimensions.

        The surrogate of the log-probability with uniform weight on all flow times; compare it only between actions
        of one observation on equal `draws`.
        """
        errors, _ = self._errors(batch, actions, draws)
        return -errors.sum(dim=(1, 2))

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """`score` of C chunks on K draws each, [B, C, K]; the observation is encoded once for all of them.

        See Policy.scores for the arguments; noise is [B, K, T, A_model] or [B, C, K, T, A_model].
        """
        B, C, T, A = candidates.shape
        self._check_chunk(candidates, 4)
        prepared, inputs = self._inputs(batch, candidates)
        clean = self._pad(self.model_actions(prepared[ACTION].flatten(0, 1))).view(B, C, 1, T, -1)
        draws = draws.to(self.device)
        noise, time = draws.noise, draws.time
        if time.ndim == 2:
            noise, time = noise[:, None], time[:, None]
        K = time.shape[2]
        noise, time = noise.expand(B, C, K, T, -1), time.expand(B, C, K)
        at = time[..., None, None]
        points = at * noise + (1 - at) * clean
        found = self.velocities(inputs, points.flatten(1, 2), time.flatten(1, 2)).view(B, C, K, T, -1)
        errors = (found - (noise - clean))[..., :A].square().sum(-1)
        if PAD in batch:
            errors = errors * ~batch[PAD].to(self.device).bool()[:, :, None]
        return -errors.sum(-1)

    def velocity(self, batch: Batch, points: Tensor, time: Tensor) -> Tensor:
        """[B, R, T, A_model] velocities (noise minus data) at R points of each observation's flow.

        The observation is encoded once. Points are in the model's own space: normalised and padded actions.

        Args:
            points: [B, R, T, A_model].
            time: [B, R]; 1 is noise.
        """
        _, inputs = self._inputs(batch, None)
        return self.velocities(inputs, points.to(self.device), time.to(self.device))

    def to_model(self, batch: Batch, actions: Tensor) -> Tensor:
        return self._pad(self.model_actions(self._prepare(batch, actions)[ACTION]))

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None,
            steering: Steering | None = None) -> Chunk:  # fmt: skip
        """Sample a chunk [B, T, A] on the CPU, in environment units.

        With `prefix` [B, P, A] the first P rows follow the straight line from their noise to the committed actions
        through all Euler steps (inpainting), so the rest is denoised beside them; they come back unchanged. The rest
        hardly heeds them, because it has moved before they are clean: to go on from an old chunk, give `steering`,
        whose rows are `Chunk.raw` of that chunk from the present step on.
        Integrated by the Euler steps of the config, as LeRobot does, or by `sampler` where that is set.
        The caller chooses train or eval mode.

        Raises:
            BurnishError: an unknown sampler; both of the two; steering by a sampler of several passes a step, or a
                "trained" one by more delay than the policy was trained for.
        """
        if prefix is not None and steering is not None:
            raise BurnishError("act with prefix and steering", "one of the two")
        solver = make_solver(self.sampler) if self.sampler else None
        inputs, committed = self.begin(batch, prefix)
        noise = (draws or self.draw(len(batch[TASK]), self.generator)).to(self.device).noise
        guide = None if steering is None else self.guide(steering, noise, len(solver.steps) if solver else 0)
        model = self.policy.model
        if guide is not None:
            trained = conditioned(model, guide.target, guide.committed[..., 0])
            guided = without_gradients(model) if guide.differentiates else nullcontext()
            with trained if guide.mode == "trained" else guided:
                solver = solver or make_solver(f"euler:{self.flow_steps}")
                return self.finish(guide.finish(sample_with(model, solver, inputs, noise, guide)))
        with _committed(model, noise, committed):
            if solver is None:
                sampled = model.sample_actions(*inputs, noise=noise)
            else:
                sampled = sample_with(model, solver, inputs, noise)
        return self.finish(sampled, prefix)

    def guide(self, steering: Steering, noise: Tensor, steps: int = 0) -> Guide:
        """`steering` for this policy and noise [B, T, A_model]; `steps` are those of its config.

        Raises:
            BurnishError: rows that are no longer what they say (relative actions), or more delay than was trained.
        """
        if self.config.__dict__.get("use_relative_actions"):
            raise BurnishError("steering of a policy with actions relative to the state, which has moved since",
                               "absolute actions, or deltas from step to step")  # fmt: skip
        asked, trained = int(steering.rows[0].max()), self.rtc_training_max_delay
        if steering.mode == "trained" and asked > trained:
            raise BurnishError(f"a delay of {asked} steps for a policy that was trained for {trained}",
                               "at most that", "mode 'guided', which needs no training")  # fmt: skip
        if steering.jacobian == "auto":
            steering = replace(steering, jacobian=self.jacobian)
        return Guide(steering, noise, steps or self.flow_steps, self.action_dim)

    @property
    def flow_steps(self) -> int:
        settings = self.config.__dict__
        return int(settings["num_steps"] if "num_steps" in settings else settings["num_inference_steps"])

    def set_steps(self, count: int) -> None:
        setattr(self.config, "num_steps" if "num_steps" in vars(self.config) else "num_inference_steps", count)

    @torch.no_grad()
    def candidates(self, batch: Batch, noise: Tensor) -> Chunk:
        """Chunks [B, K, T, A] of one observation each from noise [B, K, T, A_model]; it is encoded once."""
        inputs, _ = self.begin(batch)
        model, flat = self.policy.model, noise.to(self.device).flatten(0, 1)
        with shared(model, noise.shape[1]):
            if self.sampler:
                sampled = sample_with(model, make_solver(self.sampler), inputs, flat)
            else:
                sampled = model.sample_actions(*inputs, noise=flat)
        chunk = self.finish(sampled)
        return Chunk(chunk.actions.unflatten(0, noise.shape[:2]), sampled.unflatten(0, noise.shape[:2]))

    def begin(self, batch: Batch, prefix: Tensor | None = None) -> tuple[list[Any], Tensor | None]:
        """What comes before sampling: the inputs of `sample_actions`, and `prefix` [B, P, A] as `velocity` takes
        actions; None where nothing is committed.
        """
        if prefix is not None and prefix.shape[1] == 0:
            prefix = None
        prepared, inputs = self._inputs(batch, prefix)
        return inputs, None if prefix is None else self._pad(self.model_actions(prepared[ACTION]))

    def finish(self, sampled: Tensor, prefix: Tensor | None = None) -> Chunk:
        """What comes after it: a chunk on the CPU in environment units, its committed rows as they were given."""
        actions = self.postprocessor(self.policy_actions(sampled[:, :, : self.action_dim]))
        if prefix is not None:
            actions[:, : prefix.shape[1]] = prefix.to(actions)
        return Chunk(actions, sampled)

    def flow_parts(self) -> FlowParts:
        return flow_parts(self.name, self.policy.model)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Standard normal noise [B, T, max_action_dim] and Beta-distributed times [B], as LeRobot trains with.

        In training mode, where `rtc_training_max_delay` is set, also delays from 0 to it, all equally likely.
        """
        alpha, beta, scale, offset = self.time_shape()
        shape = (batch_size, self.chunk_size, self.config.max_action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        uniform = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float64)
        delay, most = None, self.rtc_training_max_delay
        if most and self.training:
            delay = torch.randint(most + 1, (batch_size,), generator=generator, device=generator.device)
        return Draws(noise, (_beta_quantile(uniform, alpha, beta) * scale + offset).to(noise), delay=delay)

    def write_extras(self, folder: Path, home: Path) -> None:
        super().write_extras(folder, home)
        if self.rtc_training_max_delay:
            (folder / RTC_FILE).write_text(json.dumps({"rtc_training_max_delay": self.rtc_training_max_delay}))

    def read_extras(self, folder: Path) -> None:
        if (folder / RTC_FILE).exists():
            found = read_object(folder / RTC_FILE, folder).get("rtc_training_max_delay")
            if type(found) is not int or not 0 <= found < self.chunk_size:
                raise BurnishError(f"{folder / RTC_FILE}: rtc_training_max_delay is {str(found)[:40]!r}",
                                   f"a whole number from 0 to {self.chunk_size - 1}")  # fmt: skip
            self.rtc_training_max_delay = found

    # Inside.

    def _inputs(self, batch: Batch, actions: Tensor | None) -> tuple[dict[str, Any], list[Any]]:
        """The prepared batch and what the model takes of it; open captures learn its layout."""
        prepared = self._prepare(batch, actions)
        inputs = self.model_inputs(prepared)
        self._note(inputs[0], inputs[1], inputs[3])
        return prepared, inputs

    def _errors(self, batch: Batch, actions: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """Squared velocity errors [B, T, A], zero on padded steps, and the valid steps bool [B, T]."""
        self._check_chunk(actions)
        prepared, inputs = self._inputs(batch, actions)
        draws = (draws or self.draw(len(actions), self.generator)).to(self.device)
        target = self._pad(self.model_actions(prepared[ACTION]))
        valid = torch.ones(target.shape[:2], dtype=torch.bool, device=self.device)
        if PAD in batch:
            valid = ~batch[PAD].to(self.device).bool()
        with ExitStack() as inside:
            if draws.delay is not None:
                done = torch.arange(self.chunk_size, device=self.device) < draws.delay[:, None]
                inside.enter_context(conditioned(self.policy.model, target, done))
                valid = valid & ~done
            errors = self.policy.model.forward(*inputs, target, draws.noise, draws.time)[:, :, : self.action_dim]
        return errors if PAD not in batch and draws.delay is None else errors * valid[:, :, None], valid

    def _pad(self, actions: Tensor) -> Tensor:
        return F.pad(actions, (0, self.config.max_action_dim - actions.shape[-1]))


def _beta_quantile(uniform: Tensor, alpha: float, beta: float) -> Tensor:
    """Beta(alpha, beta) samples from uniform ones, float64."""
    if beta == 1:  # LeRobot's default; the closed form spares a GPU the wait for the host
        return uniform ** (1 / alpha)
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, beta, uniform.cpu().numpy())).to(uniform.device)


def _committed(model: nn.Module, noise: Tensor, clean: Tensor | None) -> AbstractContextManager[None]:
    """Inside, `model.sample_actions` keeps its first rows on the straight line from `noise` to `clean` [B, P, A]."""
    if clean is None:
        return nullcontext()
    steps, denoise = clean.shape[1], model.denoise_step
    velocity = noise[:, :steps] - clean

    def denoise_rest(*args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([velocity, denoise(*args, **kwargs)[:, steps:]], dim=1)

    return replaced(model, "denoise_step", denoise_rest)
