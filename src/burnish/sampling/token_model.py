"""What a token policy and a decoder agree on: action tokens, and a cache with one slot for each token position.

The sequence is [prompt | L action tokens]. Slot s < P of the cache belongs to prompt position s, slot P + i to action
position i, and the last slot P + L is scrap. A forward pass feeds any action tokens; their keys and values go into
their own slots before attention looks at the slots, so a block is cached by no longer feeding it. Nothing here knows
how a block is decoded, and no decoder knows a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry
from burnish.core.types import Batch
from burnish.sampling.kept import Kept


@dataclass(frozen=True)
class Prompt:
    """The prompt after the vision tower and the embedding: what the language model is fed.

    Args:
        states: float [B, P, D].
        valid: bool [B, P], False on padding.
        seeds: long [B], of what a decoder draws for each sample; None where it draws nothing, or always the same.
        carry: long [B, L], what is known of the chunk already, see `Decoder`; None where nothing is.
    """

    states: Tensor
    valid: Tensor
    seeds: Tensor | None = None
    carry: Tensor | None = None


@dataclass
class TokenCache:
    """Keys and values in slots that never move; the model writes them in place.

    Args:
        keys: for each layer [B, H_kv, P + L + 1, D_h].
        values: like `keys`.
        valid: bool [B, P], False on padding of the prompt.
        prompt_logits: [B, V] of the last prompt position, which predict action position 0 where the policy shifts by
            one.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    prompt_logits: Tensor


def sees(query: Tensor, slot: Tensor, block: int) -> Tensor:
    """Whether the action token at `query` may attend to that at `slot` (positions; they broadcast): no later block."""
    return slot // block <= query // block


def visible(valid: Tensor, seen: Tensor) -> Tensor:
    """bool [B, R, P + S]: valid positions [B, P] of the prompt, then what is seen of the action slots, [(B,) R, S]."""
    return torch.cat((valid[:, None].expand(-1, seen.shape[-2], -1), seen.expand(len(valid), -1, -1)), 2)


def dense_mask(valid: Tensor, length: int, block: int, prompt_sees_actions: bool = False) -> Tensor:
    """bool [B, P + L, P + L], True where a query (second axis) may attend to a slot (third).

    The mask of Fast-dVLA's figure 5 (D2F's): the prompt sees the prompt, an action token sees it and all blocks up to
    its own, noisy earlier blocks included.

    Args:
        valid: bool [B, P], False on padding of the prompt, which nobody sees.
        length: L, action tokens.
        block: tokens of a block; `length` is bidirectional, 1 causal.
        prompt_sees_actions: the prompt sees action tokens too.
    """
    size = valid.shape[1]
    places = torch.arange(length, device=valid.device)
    actions = torch.cat((torch.full((size, length), prompt_sees_actions, device=valid.device),
                         sees(places[:, None], places[None], block)))  # fmt: skip
    return visible(valid, actions)


class TokenModel(ABC):
    """A token policy as decoders see it: a plain object around the module, cheap to make.

    Attributes:
        length: L, action tokens in a chunk (time-major: position = step * A + dimension).
        step_length: A, tokens of one control step.
        vocabulary: V, legal action ids 0 .. V - 1.
        mask_id: the id that stands for MASK (V), or None where the policy was never trained with one.
        shift: True where the token at a position is read from the logits of the position before it.
        block: action tokens that see one another in training: L is bidirectional, 1 is causal, anything between
            is block-causal. A token sees all tokens of its own and of earlier blocks.
        prompt_sees_actions: True where the prompt attended to actions in training; its keys then change at every pass.
        time_ordered: False where positions do not follow control steps (FAST): no prefix, no streaming.
        executed: action tokens at the start of a chunk that will be executed; 0 where nobody knows.
    """

    length: int
    step_length: int
    vocabulary: int
    mask_id: int | None
    shift: bool
    block: int
    prompt_sees_actions: bool
    time_ordered: bool
    executed: int = 0

    def keep(self, kept: Kept | None) -> None:
        """From now on look for keys of a prompt's pictures and text in `kept`; None ends that."""
        raise BurnishError("a token model that keeps no keys between calls", "a policy of burnish's", "--cache none")

    @abstractmethod
    def embed(self, batch: Batch) -> Prompt:
        """Vision tower and embeddings of a batch: no language-model layer runs."""

    @abstractmethod
    def empty(self, prompt: Prompt) -> TokenCache:
        """A cache of zeros for `prompt`; its buffers may be used again for prompts of the same shape."""

    @abstractmethod
    def whole(self, prompt: Prompt, ids: Tensor, visible: Tensor, cache: TokenCache, *, read: Tensor | None = None,
              see_actions: bool = False) -> Tensor:  # fmt: skip
        """One joint forward pass over the prompt and the action tokens 0 .. R - 1; R = 0 is a plain prefill.

        Fills slots 0 .. P + R - 1, `valid` and `prompt_logits` of the cache.

        Args:
            prompt: of `embed`. How its positions see one another is the model's affair; padding is never seen.
            ids: long [B, R], `mask_id` for MASK.
            visible: bool [B, R, P + R], the slots that each action token may attend to.
            see_actions: the prompt attends to all R action tokens too (as in policies with `prompt_sees_actions`).
        """

    @abstractmethod
    def extend(
        self, ids: Tensor, positions: Tensor, visible: Tensor, cache: TokenCache, *, read: Tensor | None = None
    ) -> Tensor:
        """One forward pass over R action tokens, which need not be neighbours and may differ between samples.

        Writes their keys and values into slots P + positions, then attends to the first S slots.

        Args:
            ids: long [B, R], `mask_id` for MASK, anything legal on padding.
            positions: long [B, R], 0 .. L - 1; L marks padding (it lands in the scrap slot, which nobody may see).
            visible: bool [B, R, S], S <= P + L; S may be cut short so that no time is lost on slots that nobody sees.
                Every token, padding too, sees at least one slot, so that nothing becomes NaN.
            cache: with prompt and earlier tokens in it.
            read: long [B, M], indices into R of the tokens whose logits are wanted; None means all. The others need
                no head (and no query in the last layer).

        Returns:
            Logits over the legal ids, [B, M, V] or [B, R, V], as the model has them: the caller knows about `shift`.
        """


@dataclass
class Decoded:
    """What a decoder returns.

    Args:
        ids: long [B, L]; `mask_id` where an early exit left a token masked.
        passes: forward passes of the model (NFE), those over the prompt included; the prompt shares its pass with the
            first tokens if it can.
        positions: token positions fed in all passes for each sample, prompt included, padding too.
        unmasked: long [B, L], the pass (from 1) in which each token became final; 0 for those of the prefix.
        host_syncs: times that the host waited for the device.
        detail: figures of single decoders.
    """

    ids: Tensor
    passes: int
    positions: int
    unmasked: Tensor
    host_syncs: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


Stream = Callable[[int, Tensor], None]
"""Called as stream(number of finished control steps, ids [B, L]) whenever more steps of every sample are final."""


class Decoder(ABC):
    """A decoder made for one model and one plan; keeps its buffers and compiled passes from call to call.

    Attributes:
        draws: whether tokens or their order are drawn, by `Prompt.seeds`.
        carries: whether it can begin with tokens anywhere in the chunk.
    """

    model: TokenModel
    draws: bool = False
    carries: bool = False

    @torch.no_grad()
    def __call__(self, prompt: Prompt, *, prefix: Tensor | None = None, until: int | None = None,
                 stream: Stream | None = None, carry: Tensor | None = None) -> Decoded:  # fmt: skip
        """Decode one chunk, without gradient.

        Args:
            prompt: of `TokenModel.embed`.
            prefix: long [B, n], known tokens that the chunk starts with (whole control steps).
            until: stop as soon as so many control steps are final; None decodes the whole chunk.
            stream: called with finished steps as they come.
            carry: long [B, L], tokens that an earlier call has found, `mask_id` where nothing is known; they stay as
                they are, and of the first ones `prefix` decides.

        Raises:
            BurnishError: FAST tokens with a prefix or an early exit; a prefix or exit that does not fit the chunk;
                logits that are no numbers; a decoder that carries nothing.
        """
        prefix, goal = _check_call(self.model, len(prompt.states), prompt.states.device, prefix, until)
        if carry is None:
            return self.decode(prompt, prefix, goal, stream)
        _check_carry(self, carry, len(prompt.states))
        carry = carry.to(prefix.device).clone()
        carry[:, : prefix.shape[1]] = prefix
        return self.decode(replace(prompt, carry=carry), prefix, goal, stream)

    @abstractmethod
    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        """As a call, with a prefix long [B, n] that may be empty, and the number of leading tokens to decode."""


def noise_seeds(noise: Tensor) -> Tensor:
    """long [B], a seed for each sample from the bits of its noise [B, ...]: the same alone and among others."""
    rows = noise.detach().flatten(1).float().cpu().numpy()
    return torch.tensor([int.from_bytes(blake2b(row.tobytes(), digest_size=7).digest()) for row in rows])


def _check_call(
    model: TokenModel, num: int, device: torch.device, prefix: Tensor | None, until: int | None
) -> tuple[Tensor, int]:
    """The prefix (empty where there is none) and the number of tokens to decode."""
    steps = model.length // model.step_length
    if not model.time_ordered and (until is not None or (prefix is not None and prefix.shape[1])):
        raise BurnishError(
            "a prefix or an early exit with FAST tokens, which stand for frequencies and not for control steps",
            "binned actions",
        )
    if until is not None and not 1 <= until <= steps:
        raise BurnishError(f"early exit after {until} control steps", f"1 to {steps}")
    goal = model.length if until is None else until * model.step_length
    if prefix is None:
        return torch.zeros(num, 0, dtype=torch.long, device=device), goal
    if prefix.ndim != 2 or len(prefix) != num or prefix.shape[1] > model.length or prefix.shape[1] % model.step_length:
        raise BurnishError(
            f"a prefix of shape {list(prefix.shape)}",
            f"[{num}, n] with n a multiple of the {model.step_length} tokens of a control step, at most {model.length}",
        )
    if prefix.numel() and (int(prefix.min()) < 0 or int(prefix.max()) >= model.vocabulary):
        raise BurnishError("a prefix with ids that are no actions", f"ids of 0 to {model.vocabulary - 1}")
    return prefix.to(device), goal


def _check_carry(decoder: Decoder, carry: Tensor, num: int) -> None:
    model = decoder.model
    if not decoder.carries or model.mask_id is None or not model.time_ordered:
        raise BurnishError("tokens to carry on with for a decoder that goes from left to right, or without order",
                           "binned actions of masked diffusion", "decoder pipelined")  # fmt: skip
    if carry.shape != (num, model.length):
        raise BurnishError(f"carried tokens of shape {list(carry.shape)}", f"[{num}, {model.length}]")
    if carry.numel() and not 0 <= int(carry.min()) <= int(carry.max()) <= model.mask_id:
        raise BurnishError("carried tokens that are no actions", f"ids of 0 to {model.mask_id}, the last being MASK")


DECODERS: Registry[Callable[..., Decoder]] = Registry("decoder", room="burnish.sampling")
"""Decoders by name: DECODERS.get(name)(model, **options of a DecodePlan) -> Decoder. Use `make_decoder`."""


def make_decoder(name: str, model: TokenModel, **options: Any) -> Decoder:
    """The decoder called `name` for `model`; those of outside packages too (entry points `burnish.decoders`).

    Raises:
        BurnishError: unknown name, or options that cannot work with this model, with the reason.
    """
    return DECODERS.get(name)(model, **options)
