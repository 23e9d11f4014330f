"""LeRobot's policy class of `burnish_discrete`: batches have gone through the processors, actions are normalised."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.policies.discrete import losses
from burnish.policies.discrete.configuration_discrete import DiscreteConfig
from burnish.policies.discrete.network import TokenNet
from burnish.policies.discrete.noise import NOISE, hide
from burnish.policies.discrete.token_model import NetTokenModel
from burnish.policies.folder import load_vlm
from burnish.policies.keys import ACTION, PAD
from burnish.sampling.token_model import Decoder, Prompt, make_decoder, sees, visible


class DiscretePolicy(PreTrainedPolicy):
    """See DiscreteConfig.

    Args:
        config: with features.
        dataset_stats: LeRobot's statistics, for quantile bins; not needed where weights are loaded afterwards.
    """

    config_class = DiscreteConfig
    name = "burnish_discrete"

    def __init__(self, config: DiscreteConfig, dataset_stats: dict[str, Any] | None = None, **_: Any):
        super().__init__(config)
        config.validate_features()
        self.model = TokenNet(config, _make_vlm(config))
        if dataset_stats is not None:
            self.fit_tokens(dataset_stats)
        self._decoders: dict[str, Decoder] = {}
        self.reset()

    def fit_tokens(self, dataset_stats: dict[str, Any]) -> None:
        """Set quantile bins to a data set; others need nothing."""
        if self.config.tokenizer != "quantile":
            return
        bounds = {"QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}
        mode = self.config.normalization_mapping["ACTION"].value
        self.model.tokens.fit_quantiles(dataset_stats[ACTION], bounds[mode])

    def get_optim_params(self) -> Any:
        return self.parameters()

    def reset(self) -> None:
        """Forget actions that were decoded but not executed."""
        self._queue: deque[Tensor] = deque()

    # Training.

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Noise [B, T, A] ([B, L, 1] with FAST), time [B] in (0, 1], the tokens to hide and to learn from, [B, L]."""
        config, device = self.config, generator.device
        columns = config.action_dim if self.model.tokens.time_ordered else 1
        shape = (batch_size, config.length // columns, columns)
        noise = torch.randn(shape, generator=generator, device=device)
        time = 1 - torch.rand(batch_size, generator=generator, device=device)
        everything = torch.ones(batch_size, config.length, dtype=torch.bool, device=device)
        if config.training != "diffusion":
            return Draws(noise, time, everything & (config.training == "parallel"), everything)
        # A bidirectional model has no blocks; schedules that know some then work on control steps.
        block = config.block if config.block < config.length else config.action_dim
        block = block if self.model.tokens.time_ordered else config.length
        shares = NOISE.get(config.noise)(batch_size, config.length // block, generator, **config.noise_options)
        return Draws(noise, time, *hide(shares, block, generator))

    def logits(self, prompt: Prompt, ids: Tensor, hidden: Tensor, block: int | None = None,
               prompt_sees_actions: bool | None = None) -> Tensor:  # fmt: skip
        """[B, L, V] logits of every action token, one forward pass over prompt and actions.

        Args:
            prompt: embedded observations.
            ids: long [B, L], the true tokens.
            hidden: bool [B, L], tokens that the model does not see.
            block: tokens that see one another; None means the policy's own.
            prompt_sees_actions: whether the prompt attends to actions; None means as in the policy.
        """
        config, model = self.config, self.model
        opened = config.prompt_sees_actions if prompt_sees_actions is None else prompt_sees_actions
        index = torch.arange(config.length, device=ids.device)
        seen = sees(index[:, None], index[None, :], block or config.block)
        given = torch.where(hidden, model.mask_id, ids)
        mask = visible(prompt.valid, seen)
        states = model.joint(prompt, given, index.expand_as(ids), mask, see_actions=opened)
        first = prompt.states.shape[1] - int(config.shift)
        return model.head(states[:, first : first + config.length])

    def token_losses(self, prompt: Prompt, actions: Tensor, draws: Draws, padded: Tensor | None) -> dict[str, Tensor]:
        """Losses [B, L] by name, their weights [B, L] under "weight", and "ids", "hidden", "logits".

        Args:
            prompt: embedded observations.
            actions: [B, T, A], normalised.
            draws: of `draw`.
            padded: bool [B, T] or None.
        """
        if draws.masks is None:
            raise BurnishError("draws without masks", "draws of policy.draw", "policy.draw(batch_size, generator)")
        tokens = self.model.tokens
        ids = tokens.encode(actions)
        valid = self.valid_tokens(ids, padded)
        hidden = draws.masks if self.config.training == "autoregressive" else draws.masks | ~valid
        logits = self.logits(prompt, ids, hidden)
        out = {"ids": ids, "hidden": hidden, "logits": logits, "weight": (draws.learned & valid).float()}
        out["cross_entropy"] = losses.cross_entropy(logits, ids)
        if self.config.ordinal_weight > 0 and tokens.time_ordered:
            within = actions.clamp(tokens.edges[:, 0], tokens.edges[:, -1])
            out["ordinal"] = losses.ordinal(logits, within.flatten(1), tokens.centres)
        return out

    def valid_tokens(self, ids: Tensor, padded: Tensor | None) -> Tensor:
        """bool [B, L]; FAST mixes all steps, so its tokens always count."""
        if padded is None or not self.model.tokens.time_ordered:
            return torch.ones_like(ids, dtype=torch.bool)
        return ~padded.to(ids.device).bool().repeat_interleave(self.config.action_dim, dim=1)

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """LeRobot's training call; masks come from torch's global generator, as LeRobot's policies have it."""
        actions = batch[ACTION]
        seed = int(torch.randint(2**62, (1,)))
        draws = self.draw(len(actions), torch.Generator(actions.device).manual_seed(seed))
        out = self.token_losses(self.model.prompt(batch), actions, draws, batch.get(PAD))
        loss = self.combine(out)
        summed, weight = (loss * out["weight"]).sum(1), out["weight"].sum(1)
        if reduction == "none":
            return summed / weight.clamp_min(1), {}
        return summed.sum() / weight.sum().clamp_min(1), {}

    def combine(self, out: dict[str, Tensor]) -> Tensor:
        """[B, L] loss of every token."""
        if "ordinal" not in out:
            return out["cross_entropy"]
        return out["cross_entropy"] + self.config.ordinal_weight * out["ordinal"]

    def log_likelihood(self, prompt: Prompt, actions: Tensor, draws: Draws, padded: Tensor | None) -> Tensor:
        """[B] log-probability of `actions`: exact for autoregressive and parallel policies; for diffusion an unbiased
        estimate of its lower bound, whose masks follow from `draws.noise` and `draws.time`.
        """
        config, tokens = self.config, self.model.tokens
        ids = tokens.encode(actions)
        valid = self.valid_tokens(ids, padded)
        if config.training != "diffusion":
            hidden = torch.full_like(valid, config.training == "parallel")
            nats = losses.cross_entropy(self.logits(prompt, ids, hidden), ids)
            return -(nats * valid).sum(1)
        hidden, weight = losses.any_order_masks(draws.noise.flatten(1), draws.time, valid, config.block)
        logits = self._given_clean_blocks(prompt, ids, hidden)
        return -(losses.cross_entropy(logits, ids) * weight).sum(1)

    def _given_clean_blocks(self, prompt: Prompt, ids: Tensor, hidden: Tensor) -> Tensor:
        """[B, L, V]: every block with its own hidden tokens, given all earlier blocks without any.

        One forward pass over [noisy | clean] tokens at the same positions, as in block diffusion (arXiv 2503.09573).
        """
        config, model, L = self.config, self.model, self.config.length
        if config.block == L:
            return self.logits(prompt, ids, hidden)
        index = torch.arange(L, device=ids.device)
        block = index // config.block
        same, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
        seen = torch.cat([torch.cat([same, before], 1), torch.cat([same & False, same | before], 1)])
        both = torch.cat([torch.where(hidden, model.mask_id, ids), ids], dim=1)
        states = model.joint(prompt, both, torch.cat([index, index]).expand_as(both), visible(prompt.valid, seen))
        read = prompt.states.shape[1] + index
        if config.shift:
            # The first token of a block is read from the last position of the block before, clean by then.
            read = torch.where(index % config.block == 0, read + L, read) - 1
            read = torch.where(index == 0, prompt.states.shape[1] - 1, read)
        return model.head(states[:, read])

    # Acting.

    @torch.no_grad()
    def decode(
        self, prompt: Prompt, prefix: Tensor | None = None, stream: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Normalised actions [B, T, A].

        Args:
            prompt: embedded observations.
            prefix: [B, n, A], committed normalised actions.
            stream: called with the number of finished control steps and the normalised actions [B, T, A] as they come;
                FAST tokens have no order, so all steps come at once.

        Raises:
            BurnishError: a prefix with FAST tokens.
        """
        ids = None
        if prefix is not None and prefix.shape[1]:
            if not self.model.tokens.time_ordered:
                raise BurnishError("a committed prefix for a policy with FAST tokens, which have no order in time",
                                   "a policy with binned tokens")  # fmt: skip
            ids = self.model.tokens.encode(prefix)

        def actions(found: Tensor) -> Tensor:
            return self.model.tokens.decode(found.clamp(max=self.model.tokens.vocabulary - 1))  # MASK has no action

        ordered = self.model.tokens.time_ordered
        tell = None if stream is None or not ordered else lambda steps, found: stream(steps, actions(found))
        found = actions(self.decoder()(prompt, prefix=ids, stream=tell).ids)
        if stream is not None and not ordered:
            stream(found.shape[1], found)
        return found

    def decoder(self) -> Decoder:
        """The decoder that the config names; made once, as it keeps its buffers."""
        name = self.config.decoder_name
        key = f"{name} {sorted(self.config.decoder_options.items())}"
        if key not in self._decoders:
            self._decoders[key] = make_decoder(name, NetTokenModel(self.model), **self.config.decoder_options)
        return self._decoders[key]

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Normalised actions [B, T, A]."""
        self.eval()
        return self.decode(self.model.prompt(batch))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action [B, A]; decodes a new chunk when `n_action_steps` are used up."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].transpose(0, 1))
        return self._queue.popleft()


def _make_vlm(config: DiscreteConfig) -> Any:
    vlm = load_vlm(config.vlm_model_name, weights=config.load_vlm_weights)
    if not config.image_size:
        config.image_size = vlm.config.vision_config.image_size
    return vlm
