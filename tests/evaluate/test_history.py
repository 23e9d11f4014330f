"""A policy that sees earlier observations gets those of the control steps before, in every place that asks one."""

import evaluation_fakes as fakes
import numpy as np
import pytest
import torch

from burnish.core.types import Chunk, Window
from burnish.evaluate.rollout import evaluate

fakes.register()
STEP = 0.125


@pytest.mark.parametrize("executed", [1, 2, 4])
def test_moments_are_those_of_the_steps_before(tmp_path, executed):
    """The point moves by a known step, so that each moment says which it is; at the start the first is repeated."""
    policy = fakes.make_policy()
    seen, pictures = [], []

    def act(batch, draws=None, prefix=None):
        seen.append(batch["observation.state"][:-1, :, 0].numpy())
        pictures.append(batch["observation.images.front"][:-1, :, 0, 0, 0].numpy())
        return Chunk(torch.full((len(batch["task"]), 4, 1), STEP))

    policy.window, policy.act = Window((-3, -1, 0)), act
    done = evaluate(policy, "line:a", episodes=2, output=tmp_path, workers=1, batch_size=2, n_action_steps=executed,
                    video=False, progress=False, make=fakes.make_env, max_steps=8)  # fmt: skip
    assert [r.steps for r in done.records] == [8, 8]
    starts = [fakes.make_env("line:a", 8) for _ in range(2)]
    for i, env in enumerate(starts):
        env.reset(1_000_000 + i)
    for start in (env.x for env in starts):
        rows = np.unique([row for call in seen for row in call if abs((row[-1] - start) / STEP % 1) < 1e-4], axis=0)
        assert len(rows) == -(-8 // executed)
        for row in rows:
            now = round((row[-1] - start) / STEP)
            expected = [start + STEP * max(0, now + step) for step in (-3, -1, 0)]
            assert row == pytest.approx(expected, abs=1e-5)
    levels = np.clip(20 * np.concatenate(seen) + 128, 0, 255).astype(int)
    assert np.abs(np.concatenate(pictures) * 255 - levels).max() <= 1
