"""Rows of a study's result: what counts as success, differences paired on seed and trial."""

import pytest

from burnish.core.errors import BurnishError
from burnish.evaluate.records import Record
from burnish.experiments.variants import read_successes, variant_rows


def test_success_is_at_what_the_policy_was_told(tmp_path):
    records = [
        Record("lift", 0, 7, True, 9),
        Record("lift", 1, 7, True, 9, variant="instruction_swap", other_success=False),
        Record("lift", 2, 7, False, 9, variant="instruction_swap", other_success=True),
    ]
    (tmp_path / "episodes.jsonl").write_text("".join(record.to_line() + "\n" for record in records))
    assert read_successes({7: tmp_path}) == {7: {("lift", 0): 1.0, ("lift", 1): 0.0, ("lift", 2): 1.0}}


def test_differences_pair_seed_and_trial():
    variants = {"a": {0: {1: 1.0, 2: 0.0}, 1: {1: 1.0, 2: 1.0}}, "b": {1: {2: 0.0, 1: 1.0, 3: 1.0}}}
    a, b = variant_rows(variants, "a", eval="main")
    assert (a["n"], a["rate"], a["by_seed"]) == (4, 0.75, [0.5, 1.0]) and "minus_reference" not in a
    # Seed 1 alone is shared, and of it the trials 1 and 2.
    assert b["minus_reference"][0] == pytest.approx(-0.5) and b["n"] == 3 and b["eval"] == "main"
    low, high = b["minus_reference"][1:]
    assert -1 <= low <= -0.5 <= high <= 0
    with pytest.raises(BurnishError, match="share no trial"):
        variant_rows({"a": {0: {1: 1.0}, 1: {2: 1.0}}}, "a")


def test_equal_outcomes_still_have_an_interval():
    """No resample of 0 of 20 holds a success, yet 16 % could have gone unseen (Wilson)."""
    never, always = ({seed: dict.fromkeys(range(20), value) for seed in (0, 1)} for value in (0.0, 1.0))
    a, b, c = variant_rows({"a": never, "b": always, "c": never}, "a")
    assert a["interval"] == [0.0, pytest.approx(0.1611, abs=1e-4)]
    assert b["interval"] == [pytest.approx(0.8389, abs=1e-4), 1.0]
    assert c["minus_reference"] == [0.0, pytest.approx(-0.1611, abs=1e-4), pytest.approx(0.1611, abs=1e-4)]
    assert b["minus_reference"][0] == b["minus_reference"][2] == 1.0
