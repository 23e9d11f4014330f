"""Catch hidden states of a backbone while LeRobot runs its layers by hand."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies.base import Captured


@contextmanager
def catch(text_model: nn.Module, layers: Sequence[int], captured: Captured) -> Iterator[None]:
    """Fill `captured.hidden` with the outputs of `layers` in a forward inside.

    `note_layout` starts a new forward; of that, the first run through a layer counts (decoding a token or recomputing
    a checkpointed layer comes later).

    LeRobot's joint forward calls the parts of a layer one by one, so hooks on whole layers stay silent. But every
    forward (joint, prefix only, plain language model) hands the output of layer i to the input norm of layer i + 1,
    and the last one to the final norm. The tensor caught there is the very one that flows on, gradient and all.

    Args:
        text_model: has `layers`, each with `input_layernorm`, and a final `norm`.
    """
    count = len(text_model.layers)
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise BurnishError(f"layers {wrong} to capture", f"numbers from 0 to {count - 1}")

    def keep(layer: int):
        def hook(_module: nn.Module, args: tuple) -> None:
            captured.hidden.setdefault(layer, args[0])

        return hook

    with ExitStack() as stack:
        for layer in layers:
            reader = text_model.norm if layer == count - 1 else text_model.layers[layer + 1].input_layernorm
            stack.callback(reader.register_forward_pre_hook(keep(layer)).remove)
        yield


def note_layout(captured: Captured, images: Sequence[tuple[str, int, Tensor]], text_mask: Tensor, *,
                state_positions: int = 0, around_image: tuple[int, int] = (0, 0), width: int = 0) -> None:  # fmt: skip
    """Start a forward: write down which positions of its sequence hold what (images, then text, then the state).

    Args:
        captured: gets `layout` and `cameras`.
        images: camera (empty for a blank filler), number of tokens, and a bool [B] whether it is there.
        text_mask: bool [B, L], False on padding.
        state_positions: positions of the state after the text.
        around_image: special tokens before and after each image; they count as neither image nor text.
        width: the sequence is padded to this length where it is shorter.
    """
    batch, device = text_mask.shape[0], text_mask.device
    before, after = around_image
    image_positions = sum(before + tokens + after for _, tokens, _ in images)
    used = image_positions + text_mask.shape[1] + state_positions
    empty = torch.zeros(batch, max(used, width), dtype=torch.bool, device=device)
    layout = {name: empty.clone() for name in ("image", "text", "state")}
    captured.cameras.clear()
    start = 0
    for camera, tokens, present in images:
        place = slice(start + before, start + before + tokens)
        layout["image"][:, place] = present[:, None]
        if camera:
            captured.cameras[camera] = place
        start = place.stop + after
    layout["text"][:, start : start + text_mask.shape[1]] = text_mask.bool()
    layout["state"][:, used - state_positions : used] = True
    captured.hidden.clear()
    captured.layout.clear()
    captured.layout.update(layout)


def add_actions(captured: Captured, tokens: Tensor) -> None:
    """Action tokens follow what `note_layout` wrote down; bool [B, L], False on those that are padding."""
    held = dict(captured.layout)
    captured.layout.update({name: torch.cat([mask, torch.zeros_like(tokens)], dim=1) for name, mask in held.items()})
    captured.layout["action"] = torch.cat([torch.zeros_like(held["text"]), tokens], dim=1)
