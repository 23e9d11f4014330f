"""An evaluation names its sampler: the policy uses it for that long, and the folder remembers."""

import json

import pytest
from evaluation_fakes import make_env, make_policy, register

from burnish.core.errors import BurnishError
from burnish.evaluate.rollout import evaluate

register()


def measured(policy, output, **more):
    return evaluate(policy, "line:a", episodes=1, output=output, workers=1, video=False, progress=False, make=make_env,
                    **more)  # fmt: skip


def test_the_sampler_holds_for_one_evaluation_and_is_recorded(tmp_path, monkeypatch):
    policy, used = make_policy(), set()
    kind, act = type(policy), type(policy).act
    monkeypatch.setattr(kind, "capabilities", kind.capabilities | {"runtime"})
    monkeypatch.setattr(kind, "act", lambda self, *given: (used.add(self.sampler), act(self, *given))[1])
    measured(policy, tmp_path / "e", sampler="ab2:4")
    assert used == {"ab2:4"} and policy.sampler == ""
    assert json.loads((tmp_path / "e" / "settings.json").read_text())["sampler"] == "ab2:4"
    with pytest.raises(BurnishError, match="sampler"):
        measured(policy, tmp_path / "e", sampler="euler:4")
    with pytest.raises(BurnishError, match="sampler"):
        measured(policy, tmp_path / "e")


@pytest.mark.parametrize(("sampler", "said"), [("ab2:4", "no model that the executor"), ("rk:4", "unknown sampler")])
def test_what_cannot_be_sampled_is_refused_before_simulators_start(tmp_path, sampler, said):
    with pytest.raises(BurnishError, match=said):
        measured(make_policy(), tmp_path / "e", sampler=sampler)
    assert not (tmp_path / "e").exists()
