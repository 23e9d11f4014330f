"""Rollouts that branch, their pairs, and going on after a kill."""

import dataclasses
import json

import numpy as np
import pair_fakes
import pytest

from burnish.core.errors import BurnishError
from burnish.data.pairs import PairData
from burnish.evaluate import pairs as collecting
from burnish.evaluate.simulators import SimulatorPool


@pytest.fixture(autouse=True)
def walk():
    pair_fakes.register()


def collect(root, policy=None, **changes):
    settings = {"states": 6, "rollouts": 3, "workers": 2, "progress": False, "make": pair_fakes.make_env} | changes
    return collecting.collect(policy or pair_fakes.make_policy(), "walk:far", root, **settings)


def test_pairs_share_their_past_and_diverge_at_a_replan(tmp_path):
    made = collect(tmp_path / "pairs")
    assert made.episodes == 18 and 0 < made.successes < 18 and made.pairs > 0
    facts = json.loads((tmp_path / "pairs" / "burnish_pairs.json").read_text())
    data = PairData(tmp_path / "pairs", ("front",), 3, progress=False)
    actions, states, episodes = data.robot.actions, data.robot.states, data.robot.episode_index
    for pair in data.pairs:
        (better, frame), (worse, same) = pair.chosen, pair.rejected
        assert frame == same and frame % 2 == 0  # two steps of each chunk are executed
        assert facts["outcomes"][better] and not facts["outcomes"][worse]
        assert better // 3 == worse // 3  # three rollouts of each initial state
        one, two = actions[episodes == better], actions[episodes == worse]
        assert np.array_equal(one[:frame], two[:frame]) and not np.array_equal(one[frame], two[frame])
        assert np.array_equal(states[episodes == better][frame], states[episodes == worse][frame])
    assert {p.chosen[1] for p in data.pairs} != {0}  # not all diverge at the start


def test_a_killed_collection_goes_on_to_the_same_pairs(tmp_path, monkeypatch):
    whole = collect(tmp_path / "whole", states=4)
    calls = []
    start = SimulatorPool.start

    def dies(self, *given):
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt
        start(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SimulatorPool, "start", dies)
        collect(tmp_path / "again", states=4)
    assert not (tmp_path / "again").exists()
    with pytest.raises(BurnishError, match="was made with rollouts 3"):
        collect(tmp_path / "again", states=4, rollouts=4)
    assert collect(tmp_path / "again", states=4).pairs == whole.pairs
    assert collect(tmp_path / "again", states=4) == dataclasses.replace(whole, root=tmp_path / "again")  # made before
    with pytest.raises(BurnishError, match="was made with seed 0"):
        collect(tmp_path / "again", states=4, seed=1)
    one, two = ((tmp_path / name / "pairs.jsonl").read_text() for name in ("whole", "again"))
    assert one == two and not (tmp_path / "again.partial").exists()
    facts = tmp_path / "again" / "burnish_pairs.json"  # as release 0.1 wrote it
    facts.write_text(facts.read_text().replace('"offsets"', '"leads"'))
    assert collect(tmp_path / "again", states=4).pairs == whole.pairs
    with pytest.raises(BurnishError, match=r"was made with offsets \[0\]"):
        collect(tmp_path / "again", states=4, offsets=(0, 1))


def test_fixed_initial_states_are_left_for_evaluation(tmp_path, monkeypatch):
    begun, last, start = [], 100, SimulatorPool.start

    def watched(self, slot, episode):
        begun.append(episode.initial_state)
        if len(begun) == last:
            raise KeyboardInterrupt
        start(self, slot, episode)

    monkeypatch.setattr(SimulatorPool, "start", watched)
    collect(tmp_path / "pairs", states=4, first_state=1, make=pair_fakes.make_fixed)
    assert set(begun) == {5, 6, 7, 8}
    last = len(begun) + 7
    with pytest.raises(KeyboardInterrupt):  # as an earlier version: the first ones
        collect(tmp_path / "again", states=4, first_state=1)
    with pytest.raises(BurnishError, match=r"of other initial states.*those from 5 on.*rm -r '.*again.partial'"):
        collect(tmp_path / "again", states=4, first_state=1, make=pair_fakes.make_fixed)
    assert (tmp_path / "again.partial").exists()


def test_the_expert_completes_what_nobody_solved_and_noise_disturbs(tmp_path):
    lost = pair_fakes.make_policy(push=-0.5)
    with pytest.raises(BurnishError, match="no pairs; expected at least one success and one failure"):
        collect(tmp_path / "none", lost, states=2)
    made = collect(tmp_path / "helped", lost, states=8, expert=True)  # it comes too late where it takes over late
    assert made.episodes == 32 and 0 < made.successes == made.mixed_states < 8
    noisy = collect(tmp_path / "noisy", states=3, action_noise=0.8)
    assert noisy.pairs and noisy.episodes == 9


@pytest.mark.parametrize(("changes", "words"), [({"states": 0}, "0 states"), ({"rollouts": 1}, "1 rollouts")])
def test_refused_arguments(tmp_path, changes, words):
    with pytest.raises(BurnishError, match=words):
        collect(tmp_path / "pairs", **changes)
    (tmp_path / "there").mkdir()
    with pytest.raises(BurnishError, match="exists and holds no pairs; expected a new folder"):
        collect(tmp_path / "there")
