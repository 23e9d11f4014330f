"""Decoders of our own need no entry point."""

from burnish.core import registry
from burnish.core.registry import Registry


def test_our_decoders_are_found_without_any_entry_point(monkeypatch):
    """The metadata of an installation that is older than the files may name none of them."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    found = Registry("decoder", room="burnish.sampling")
    from burnish.sampling.token_model import DECODERS

    monkeypatch.setattr(DECODERS, "_read", False)
    assert {"one_pass", "d2f", "pipelined", "auto", "dd_vla", "autoregressive"} <= set(DECODERS)
    assert found.group == "burnish.decoders"
