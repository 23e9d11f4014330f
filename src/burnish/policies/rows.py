"""What a token policy and a decoder agree on: rows of action tokens, a cache with one slot for each position.

The sequence is [prompt | L action tokens]. A decoder feeds any set of rows (action positions) and says for each which
prompt rows, cached action slots and rows of the same pass it may attend to. Nothing here knows how a block is decoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from burnish.core.registry import Registry
from burnish.core.types import Batch


@dataclass
class RowCache:
    """Keys and values of the prompt and of frozen action tokens, in slots that never move.

    Args:
        keys: per layer [B, H_kv, P + L, D_h]; the first P slots hold the prompt, slot P + i action position i.
        values: like `keys`.
        prompt: bool [B, P], False on padding.
        prompt_logits: [B, V] of the last prompt row, which predicts action position 0 where the policy shifts by one.
    """

    keys: list[Tensor]
    values: list[Tensor]
    prompt: Tensor
    prompt_logits: Tensor


@dataclass
class RowOutput:
    """Logits [B, R, V] over the legal ids, and per layer keys and values [B, H_kv, R, D_h] of the rows that were fed."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class RowModel(ABC):
    """A token policy as decoders see it.

    Attributes:
        length: L, action tokens in a chunk (time-major: position = step * A + dimension).
        step_length: A, tokens of one control step.
        vocabulary: V, legal action ids 0 .. V - 1; the id V is MASK.
        shift: True where the token at a position is read from the row before it.
    """

    length: int
    step_length: int
    vocabulary: int
    shift: bool

    @abstractmethod
    def prefill(self, batch: Batch) -> RowCache:
        """One pass over the prompt (which sees no action token); the action slots are empty."""

    @abstractmethod
    def rows(self, ids: Tensor, positions: Tensor, visible: Tensor, cache: RowCache) -> RowOutput:
        """One pass over R action rows; `cache` is read, never written.

        Args:
            ids: [B, R] action ids, V for MASK.
            positions: [B, R] action positions 0 .. L - 1.
            visible: bool [B, R, P + L + R]: the slots of the cache, then the rows of this pass.
            cache: of `prefill`, with the slots that the decoder has written.
        """


Decoder = Callable[..., Tensor]
DECODERS: Registry[Decoder] = Registry("decoder")
"""Decoders by name: decoder(model: RowModel, cache: RowCache, plan, ...) -> ids [B, L]. See methods/decode."""
