"""Who sees whom in [prompt | action blocks]: the mask of Fast-dVLA's figure 5 (D2F's), dense and for flex attention.

Prompt rows see the prompt. Action rows see it and all blocks up to their own, noisy earlier blocks included, so a
single copy of the sequence is enough (block diffusion, arXiv 2503.09573, needs two).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from burnish.sampling.token_model import sees


def dense_mask(valid: Tensor, length: int, block: int, prompt_sees_actions: bool = False) -> Tensor:
    """bool [B, P + L, P + L], True where a row (second axis) may attend to a slot (third).

    Args:
        valid: bool [B, P], False on padding of the prompt, which nobody sees.
        length: L, action tokens.
        block: tokens of a block; `length` is bidirectional, 1 causal.
        prompt_sees_actions: prompt rows see action rows too.
    """
    num, size = valid.shape
    places = torch.arange(length, device=valid.device)
    actions = torch.cat((torch.full((size, length), prompt_sees_actions, device=valid.device),
                         sees(places[:, None], places[None], block)))  # fmt: skip
    prompt = valid[:, None].expand(-1, size + length, -1)
    return torch.cat((prompt, actions.expand(num, -1, -1)), 2)


def flex_mask(valid: Tensor, length: int, block: int, prompt_sees_actions: bool = False, tile: int = 128):
    """The same as a BlockMask for `torch.nn.attention.flex_attention`, which skips tiles that nobody sees.

    `tile` is handed on as BLOCK_SIZE; give the same to a kernel whose default differs, or its tiles are wrong.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    num, size = valid.shape
    rule = flex_rule(valid, block, prompt_sees_actions)
    total = size + length
    return create_block_mask(rule, num, None, total, total, device=valid.device, BLOCK_SIZE=tile)


def flex_rule(valid: Tensor, block: int, prompt_sees_actions: bool = False) -> Callable[..., Tensor]:
    """The mask function (sample, head, row, slot) -> bool behind `flex_mask`."""
    size = valid.shape[1]

    def rule(sample: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        row_is_prompt, slot_is_prompt = row < size, slot < size
        on_prompt = slot_is_prompt & valid[sample, slot.clamp(max=size - 1)]
        among_actions = ~slot_is_prompt & ~row_is_prompt & sees(row - size, slot - size, block)
        return on_prompt | among_actions | (~slot_is_prompt & row_is_prompt & prompt_sees_actions)

    return rule
