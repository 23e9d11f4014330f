"""Decoders of our own need no entry point, and recipes train with what their own table says."""

import json
from pathlib import Path

import yaml

from burnish.core import registry
from burnish.core.recipe import SHIPPED
from burnish.core.registry import Registry

ROOT = Path(__file__).parents[2]


def test_our_decoders_are_found_without_any_entry_point(monkeypatch):
    """The metadata of an installation that is older than the files may name none of them."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    found = Registry("decoder", room="burnish.sampling")
    from burnish.sampling.token_model import DECODERS

    monkeypatch.setattr(DECODERS, "_read", False)
    assert {"one_pass", "d2f", "pipelined", "auto", "dd_vla", "autoregressive"} <= set(DECODERS)
    assert found.group == "burnish.decoders"


def test_recipes_train_with_the_noise_that_their_table_found_best():
    rows = json.loads((ROOT / "results/decode/schedules.json").read_text())["rows"]
    best = max((row for row in rows if row["label"] != "labels"), key=lambda row: row["rate"])["label"]
    said = {}
    for path in SHIPPED.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        noise = (values.get("policy") or {}).get("overrides", {}).get("noise")
        said |= {str(path.relative_to(SHIPPED)): noise} if noise else {}
    assert said and set(said.values()) == {best}, said
