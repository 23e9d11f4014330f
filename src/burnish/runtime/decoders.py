"""Decode a few chunks of a token policy by one or more decoders, in numbers and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.policies.base import Policy, require
from burnish.policies.keys import PAD
from burnish.runtime.decode_plot import draw_decode
from burnish.runtime.observations import observations, split, true_tokens
from burnish.sampling.timing import measure_decoder
from burnish.sampling.token_model import DECODERS, Decoder, TokenModel, make_decoder


def compare_decoders(policy: Policy, *, decoders: Sequence[str] = (), options: dict[str, Any] | None = None,
                     own: bool = False, data: Path | str = "", count: int = 4, repeats: int = 3,
                     figure: Path | str = "", progress: bool = True) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Decode observations one at a time by every decoder.

    Args:
        policy: a token policy.
        decoders: names; none means all that fit the policy.
        options: of the decode plan, on top of each decoder's own.
        own: instead the decoder and the options in the policy's config.
        data: LeRobot data set, for action errors; "" takes random images.
        count: observations.
        repeats: timed decodes of each.
        figure: draw the passes of the first decoder that was named, or of `pipelined`, into this file.
        progress: show a bar on stderr.

    Returns:
        "decoders": figures by name (see sampling.timing.measure_decoder); "refused": why others do not fit.

    Raises:
        BurnishError: no token policy, or a decoder that was asked for and does not fit.
    """
    if count < 1 or repeats < 1:
        raise BurnishError(f"{count} observations, {repeats} repeats", "1 or more of each")
    if own and decoders:
        raise BurnishError(f"the policy's own decoder and {decoders[0]}", "one of them")
    require(policy, "tokens", "decode")
    model = policy.token_model()
    batch = observations(policy, count, data)
    with torch.no_grad():
        prompts = split(model.embed(batch))
    truth = true_tokens(policy, batch) if data else None
    names, options = list(decoders), options or {}
    if own:
        name, stored = policy.decoder
        names, options = [name], {**stored, **options}
    made, refused = _fitting(model, names, options)
    found = {
        name: measure_decoder(
            made[name],
            prompts,
            model,
            repeats=repeats,
            truth=truth,
            actions=policy.token_actions,
            padded=batch.get(PAD),
        )  # fmt: skip
        for name in progress_bar(made, desc="decoders", unit="", leave=False, shown=progress)
    }
    if figure:
        name = next(iter(made)) if names or "pipelined" not in made else "pipelined"
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
