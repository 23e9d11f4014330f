"""Decode a few chunks of a token policy by one or more decoders, in numbers and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.progress import progress_bar
from burnish.policies.base import Policy, require
from burnish.policies.keys import PAD
from burnish.runtime.observations import observations, split, true_tokens
from burnish.sampling.timing import measure_decoder
from burnish.sampling.token_model import DECODERS, Decoded, Decoder, TokenModel, make_decoder


def compare_decoders(policy: Policy, *, decoders: Sequence[str] = (), options: dict[str, Any] | None = None,
                     data: Path | str = "", count: int = 4, repeats: int = 3, figure: Path | str = "",
                     progress: bool = True) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Decode observations one at a time by every decoder.

    Args:
        decoders: names; none means all that fit the policy.
        options: of the decode plan, on top of each decoder's own.
        data: LeRobot data set, for action errors; "" takes random images.
        repeats: timed decodes of each.
        figure: draw the passes of the first decoder that was named, or of `pipelined`, into this file.

    Returns:
        "decoders": figures by name (see sampling.timing.measure_decoder); "refused": why others do not fit.
    """
    if count < 1 or repeats < 1:
        raise BurnishError(f"{count} observations, {repeats} repeats", "1 or more of each")
    require(policy, "tokens", "decode")
    model = policy.token_model()
    batch = observations(policy, count, data)
    with torch.no_grad():
        prompts = split(model.embed(batch))
    truth = true_tokens(policy, batch) if data else None
    made, refused = _fitting(model, list(decoders), options or {})
    more: dict[str, Any] = {"truth": truth, "actions": policy.token_actions, "padded": batch.get(PAD)}
    found = {
        name: measure_decoder(made[name], prompts, model, repeats=repeats, **more)
        for name in progress_bar(made, desc="decoders", unit="", leave=False, shown=progress)
    }
    if figure:
        name = next(iter(made)) if decoders or "pipelined" not in made else "pipelined"
        draw_decode(model, made[name](prompts[0]), name, Path(figure))
    return {"decoders": found, "refused": refused}


def _fitting(model: TokenModel, names: list[str], options: dict[str, Any]) -> tuple[dict[str, Decoder], dict[str, str]]:
    """Decoders by name, and why others do not fit; one that was asked for by name must fit."""
    made, refused = {}, {}
    for name in names or [name for name in DECODERS if name != "auto"]:
        try:
            made[name] = make_decoder(name, model, **options)
        except BurnishError as error:
            if names:
                raise
            refused[name] = str(error)
    if not made:
        raise BurnishError("no decoder fits this policy with these options", "", "leave --option away")
    return made, refused


# Not fed yet, MASK in a semi-activated block, MASK in a fully activated one, unmasked in this pass, unmasked, cached.
STATES = ("not fed", "masked, waiting", "masked, active", "unmasked now", "unmasked", "cached")
COLOURS = ("#f2f2f2", "#fde0c5", "#f59f5a", "#c0392b", "#8fb8de", "#1f4e79")


def token_states(decoded: Decoded, block: int) -> np.ndarray:
    """int [passes, L] of the first sample, indices into STATES, after each pass.

    Args:
        decoded: of a block decoder.
        block: tokens of a block.
    """
    unmasked = decoded.unmasked[0].cpu().numpy()
    opened, active, cached = (
        decoded.detail["blocks"][name][0].cpu().numpy().repeat(block) for name in ("opened", "active", "cached")
    )
    turns = np.arange(1, decoded.passes + 1)[:, None]
    states = np.zeros((decoded.passes, len(unmasked)), dtype=int)
    states[(opened > 0) & (opened <= turns)] = 1
    states[(active > 0) & (active <= turns)] = 2
    done = unmasked < turns
    states[done & (states > 0)] = 4
    states[unmasked == turns] = 3
    states[(cached > 0) & (cached <= turns)] = 5
    return states


def draw_decode(model: TokenModel, decoded: Decoded, title: str, path: Path) -> None:
    """Draw forward passes (downwards) over tokens (to the right); lines between control steps."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if "blocks" not in decoded.detail:
        raise BurnishError(f"a figure of '{title}', which has no blocks", "a masked decoder", "--decoder pipelined")
    history = decoded.detail["blocks"]["opened"]
    states = token_states(decoded, model.length // history.shape[1])
    height = 1.6 + 0.22 * len(states)
    figure = new_figure(min(12, 3 + 0.14 * model.length), height)
    axes = figure.subplots()
    axes.imshow(states, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=5.5, aspect="auto", interpolation="nearest")
    for step in range(1, model.length // model.step_length):
        axes.axvline(step * model.step_length - 0.5, color="white", linewidth=2)
    for line in range(1, len(states)):
        axes.axhline(line - 0.5, color="white", linewidth=0.5)
    middle = np.arange(model.length // model.step_length) * model.step_length + model.step_length / 2 - 0.5
    axes.set_xticks(middle, [str(step + 1) for step in range(len(middle))])
    axes.set_yticks(range(len(states)), [str(turn + 1) for turn in range(len(states))])
    axes.tick_params(length=0)
    axes.set_xlabel(f"control step ({model.step_length} tokens each)")
    axes.set_ylabel("forward pass")
    axes.set_title(f"{title}: {decoded.passes} forward passes, {decoded.positions} token positions", fontsize=10)
    used = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, STATES, strict=True)]
    figure.legend(handles=used, loc="outside lower center", ncols=6, fontsize=8, frameon=False, handlelength=1)
    save_figure(figure, path)
