"""LeRobot's policy class of `burnish_discrete`: batches have gone through the processors, actions are normalised."""

import re
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.policies import language
from burnish.policies.discrete import losses
from burnish.policies.discrete.configuration_discrete import DiscreteConfig
from burnish.policies.discrete.losses import NOISE, hide
from burnish.policies.discrete.network import NetTokenModel, TokenNet, bucketed
from burnish.policies.keys import ACTION, MODES, PAD, VLM_FOLDER
from burnish.policies.pretrained import load_tokenizer, load_vlm
from burnish.sampling.token_model import Decoder, Prompt, make_decoder, sees, visible


class LeRobotCalls:
    """The part of `DiscretePolicy` that only LeRobot calls."""

    config: Any
    model: nn.Module

    _action_queue_attrs = ("_queue",)
    """Where actions wait; LeRobot empties it when the instruction changes."""
    _fsdp_wrap_modules = ("LlamaDecoderLayer",)
    """Layers of SmolVLM's language model; for another VLM give --accelerator.fsdp.wrap_modules."""

    def supports_rtc(self) -> bool:
        """Committed actions are known tokens for every decoder; FAST's tokens have no order in time."""
        return self.model.tokens.time_ordered

    def committed(self, previous: Tensor | None, delay: int | None) -> Tensor | None:
        """The actions [B, n, A] that are executed while the next chunk is decoded, as a prefix of `decode`.

        Args:
            previous: [T, A] or [B, T, A], normalised actions of the earlier chunk that are left over.
            delay: how many of them will be executed by then.
        """
        if previous is None or not delay or previous.numel() == 0:
            return None
        if not self.supports_rtc():
            raise BurnishError("a committed prefix for a policy with FAST tokens, which have no order in time",
                               "a policy with binned tokens", "--inference.type=sync")  # fmt: skip
        previous = previous if previous.ndim == 3 else previous[None]
        return previous[:, : min(delay, self.config.chunk_size - 1), : self.config.action_dim]

    def supports_text_generation(self) -> bool:
        """The language model that writes actions still answers questions."""
        return True

    @torch.no_grad()
    def generate_text(self, batch: dict[str, Any]) -> str:
        """The greedy answer to `batch["query_text"]` about the first camera's image.

        Raises:
            BurnishError: a request for a subtask, which would steer the robot: no training makes an answer one.
        """
        if batch.get("query_kind", "vqa") != "vqa":
            raise BurnishError(f"a text query of kind '{batch['query_kind']}'", "vqa: a question about what is seen")
        images, _ = self.model.prepare_images(batch)
        vlm = self.model.vlm
        backbone = language.Backbone(text_model=self.model.text_model, head=vlm.get_output_embeddings(),
                                     embed_text=vlm.get_input_embeddings(),
                                     tokenizer=load_tokenizer(Path(self.config.vlm_model_name)))  # fmt: skip
        question = batch["query_text"]
        question = question if isinstance(question, str) else question[0]
        return language.greedy_answers(backbone, self.model.embed_image(images[0][:1]), [question], 16)[0]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """LoRA on queries and values of the language model, on the state's way in and the head over actions."""
        decoder = next(name for name, part in self.named_modules() if part is self.model.text_model)
        places = rf"{re.escape(decoder)}\..*\.(q|v)_proj|model\.(state_proj|head)"
        return {"target_modules": f"({places})", "modules_to_save": []}

    def _save_pretrained(self, save_directory: Path, **options: Any) -> None:
        """LeRobot's, and the VLM's small files beside it: what lerobot-train writes is whole, too."""
        super()._save_pretrained(save_directory, **options)
        source, place = Path(self.config.vlm_model_name), Path(save_directory) / VLM_FOLDER
        if source.is_dir() and source.absolute() != place.absolute():
            place.mkdir(exist_ok=True)
            for file in source.iterdir():
                if file.suffix in (".json", ".jinja", ".txt", ".model"):
                    shutil.copyfile(file, place / file.name)


_TOKENS_AT_ONCE = 512
"""Action tokens behind one prompt when several chunks are scored; attention among them grows with the square."""


class DiscretePolicy(LeRobotCalls, PreTrainedPolicy):
    """See DiscreteConfig.

    Args:
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
        self.to(getattr(torch, config.dtype))
        self._decoders: dict[str, Decoder] = {}
        self.reset()

    def fit_tokens(self, dataset_stats: dict[str, Any]) -> None:
        """Set quantile bins to a data set; others need nothing."""
        if self.config.tokenizer != "quantile":
            return
        mode = self.config.normalization_mapping["ACTION"].value
        self.model.tokens.fit_quantiles(dataset_stats[ACTION], MODES[mode])

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
            actions: [B, T, A], normalised.
            padded: bool [B, T], steps beyond the episode, see `losses.repeat_last`; or None.
        """
        if draws.masks is None:
            raise BurnishError("draws without masks", "draws of policy.draw", "policy.draw(batch_size, generator)")
        tokens, hidden, weight = self.model.tokens, draws.masks, draws.learned.float()
        actions = losses.repeat_last(actions, padded)
        ids = tokens.encode(actions)
        if self.config.doubled:
            logits = self._side_by_side(prompt, ids[:, None], hidden[:, None])[:, 0]
        else:
            logits = self.logits(prompt, ids, hidden)
        if self.config.training == "diffusion" and self.config.token_weights == "inverse_share":
            weight = weight * losses.inverse_share(hidden, self.config.block)
        out = {"ids": ids, "hidden": hidden, "logits": logits, "weight": weight}
        out["cross_entropy"] = losses.cross_entropy(logits, ids)
        if self.config.ordinal_weight > 0 and tokens.time_ordered:
            within = actions.clamp(tokens.edges[:, 0], tokens.edges[:, -1])
            out["ordinal"] = losses.ordinal(logits, within.flatten(1), tokens.centres)
        return out

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
        if "ordinal" not in out:
            return out["cross_entropy"]
        return out["cross_entropy"] + self.config.ordinal_weight * out["ordinal"]

    def log_likelihood(self, prompt: Prompt, actions: Tensor, draws: Draws, padded: Tensor | None) -> Tensor:
        """[B, C, K] log-probabilities of C chunks on K draws: exact for autoregressive and parallel policies, whatever
        the draws; for diffusion an unbiased estimate of a lower bound, whose masks follow from noise and time.

        Args:
            actions: [B, C, T, A], normalised.
            draws: noise [B, K, ...] and time [B, K], shared by the chunks; or [B, C, K, ...] and [B, C, K].
            padded: bool [B, C, T], steps that count nothing; or None. FAST mixes all steps, so its tokens always count.
        """
        tokens, (B, C, T, A) = self.model.tokens, actions.shape
        ids = tokens.encode(actions.reshape(B * C, T, A)).view(B, C, -1)
        valid = torch.ones_like(ids, dtype=torch.bool)
        if padded is not None and tokens.time_ordered:
            valid = ~padded.to(ids.device).bool().repeat_interleave(A, dim=2)
        noise, time = draws.noise.flatten(-2), draws.time
        K = time.shape[-1]
        if self.config.training != "diffusion":
            hidden = torch.full_like(valid, self.config.training == "parallel")
            nats = self._costs(prompt, ids, hidden)
            return -(nats * valid).sum(-1)[..., None].expand(B, C, K)
        if time.ndim == 2:
            noise, time = noise[:, None].expand(B, C, K, -1), time[:, None].expand(B, C, K)
        every = valid[:, :, None].expand(B, C, K, -1).flatten(0, 2)
        masks = losses.any_order_masks(noise.flatten(0, 2), time.flatten(), every, self.config.block)
        hidden, weight = (part.view(B, C * K, -1) for part in masks)
        nats = self._costs(prompt, ids.repeat_interleave(K, dim=1), hidden)
        return -(nats * weight).sum(-1).view(B, C, K)

    def copies_at_once(self, copies: int) -> tuple[int, int]:
        """How many of so many chunks share a forward pass in `log_likelihood`, and the action tokens of that pass."""
        doubled = self.config.training == "diffusion" and self.config.block < self.config.length
        size = self.config.length * (1 + doubled)
        together = 1 if self.config.prompt_sees_actions else max(1, min(copies, _TOKENS_AT_ONCE // size))
        return together, together * size

    def _costs(self, prompt: Prompt, ids: Tensor, hidden: Tensor) -> Tensor:
        """[B, R, L] nats of R chunks of each observation, which do not see one another."""
        together, _ = self.copies_at_once(ids.shape[1])
        costs = []
        for some, masked in zip(ids.split(together, 1), hidden.split(together, 1), strict=True):
            logits = self._side_by_side(prompt, some, masked)
            costs.append(losses.cross_entropy(logits.flatten(0, 1), some.flatten(0, 1)).view_as(some))
        return torch.cat(costs, dim=1)

    def _side_by_side(self, prompt: Prompt, ids: Tensor, hidden: Tensor) -> Tensor:
        """[B, R, L, V] logits of R chunks behind one prompt: every block with its own hidden tokens, given all earlier
        blocks of its chunk without any, as in block diffusion (arXiv 2503.09573): one pass over [noisy | clean] tokens
        at the same positions.
        """
        config, model, (B, R, L) = self.config, self.model, ids.shape
        if config.prompt_sees_actions:  # one chunk at a time, see `copies_at_once`
            return self.logits(prompt, ids[:, 0], hidden[:, 0])[:, None]
        index, P = torch.arange(L, device=ids.device), prompt.states.shape[1]
        block, given = index // config.block, torch.where(hidden, model.mask_id, ids)
        seen, read, size = sees(index[:, None], index[None], config.block), index - int(config.shift), L
        if config.training == "diffusion" and config.block < L:
            same, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
            seen = torch.cat([torch.cat([same, before], 1), torch.cat([same & False, same | before], 1)])
            given, size = torch.cat([given, ids], dim=2), 2 * L
            if config.shift:  # a block's first token is read from the last position of the block before, clean by then
                read = torch.where(index % config.block == 0, read + L, read)
        copies = torch.arange(R, device=ids.device)
        apart = (copies[:, None, None, None] == copies[:, None]) & seen[:, None]  # [R, size, R, size]
        places = index.repeat(R * (size // L)).expand(B, -1)
        mask = visible(prompt.valid, apart.reshape(R * size, R * size))
        states = model.joint(prompt, given.flatten(1), places, mask)
        read = P + copies[:, None] * size + read
        if config.shift:
            read[:, 0] = P - 1
        return model.head(states[:, read.flatten()]).view(B, R, L, -1)

    # Acting.

    @torch.no_grad()
    def decode(
        self, prompt: Prompt, prefix: Tensor | None = None, stream: Callable[[int, Tensor], None] | None = None,
        until: int | None = None, carry: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Normalised actions [B, T, A] and their tokens [B, L].

        Args:
            prefix: [B, n, A], committed normalised actions.
            stream: called with the number of finished control steps and the normalised actions [B, T, A] as they come;
                FAST tokens have no order, so all steps come at once.
            until, carry: see `Decoder`.
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
        tokens = self.decoder()(prompt, prefix=ids, until=until, stream=tell, carry=carry).ids
        found = actions(tokens)
        if stream is not None and not ordered:
            stream(found.shape[1], found)
        return found, tokens

    def decoder(self) -> Decoder:
        """The decoder that the config names; made once, as it keeps its buffers."""
        name = self.config.decoder_name
        key = f"{name} {sorted(self.config.decoder_options.items())}"
        if key not in self._decoders:
            self._decoders[key] = make_decoder(name, NetTokenModel(self.model), **self.config.decoder_options)
        return self._decoders[key]

    def predict_action_chunk(self, batch: dict[str, Any], inference_delay: int | None = None,
                             prev_chunk_left_over: Tensor | None = None, **_: Any) -> Tensor:  # fmt: skip
        """Normalised actions [B, T, A]; see `LeRobotCalls.committed` for what real-time chunking passes."""
        self.eval()
        prompt = self.model.prompt(bucketed(batch))
        if self.decoder().draws:  # by torch's global generator, as LeRobot's policies have it
            prompt = replace(prompt, seeds=torch.randint(2**62, (len(prompt.states),)))
        return self.decode(prompt, self.committed(prev_chunk_left_over, inference_delay))[0]

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
