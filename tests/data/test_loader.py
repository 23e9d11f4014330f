import threading
import time

import fake
import numpy as np
import pytest
import torch
from fake import CAMERA
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.data.loader import BatchSampler, LanguageData, Prefetch, RobotData


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), batch=st.integers(1, 9), world=st.integers(1, 3), passes=st.integers(1, 3))
def test_every_pass_visits_each_row_once(rows, batch, world, passes):
    samplers = [BatchSampler(rows, batch, ("seed",), rank, world) for rank in range(world)]
    steps = -(-rows * passes // (batch * world))
    seen = np.concatenate([sampler.indices(k) for k in range(steps) for sampler in samplers])
    for p in range(passes):
        assert sorted(seen[p * rows : (p + 1) * rows]) == list(range(rows))


def test_order_depends_on_seed_and_step_alone():
    one, two = BatchSampler(50, 8, (1, "a")), BatchSampler(50, 8, (1, "a"))
    forward = [one.indices(k) for k in range(20)]
    backward = [two.indices(k) for k in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
    assert any((a != BatchSampler(50, 8, (2, "a")).indices(k)).any() for k, a in enumerate(forward))


def data(root, **options):
    return RobotData(root, ["front"], 4, 6, 0, progress=False, **options)


def test_chunks_states_tasks_and_images_belong_together(dataset):
    loader = data(dataset, augmented=False)
    lengths = [9, 10, 11]  # episode e has 9 + e frames; state and action start with (episode, frame)
    for k in range(10):
        batch = loader.finish(loader.raw(k), k)
        assert batch[CAMERA].shape == (6, 3, 32, 32) and 0 <= batch[CAMERA].min() <= batch[CAMERA].max() <= 1
        for b in range(6):
            episode, frame = batch["observation.state"][b, :2].int().tolist()
            assert batch["episode_index"][b] == episode and batch["task"][b] == f"task {episode % 2}"
            last = lengths[episode] - 1
            expected = [min(frame + t, last) for t in range(4)]
            assert batch["action"][b, :, 1].int().tolist() == expected
            assert (batch["action"][b, :, 0] == episode).all()
            assert batch["action_is_pad"][b].tolist() == [frame + t > last for t in range(4)]
            row = sum(lengths[:episode]) + frame
            assert batch["index"][b] == row
            assert abs(batch[CAMERA][b, 0].mean() * 255 - 8 * row % 256) < 12


def test_augmentation_repeats_for_the_same_step_only(dataset):
    loader = data(dataset)
    a, b, c = (loader.finish(loader.raw(k), k)[CAMERA] for k in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_chosen_episodes_and_ranks(dataset):
    loader = data(dataset, episodes=[1])
    assert {int(e) for k in range(5) for e in loader.raw(k)["episode_index"]} == {1}
    ranks = [data(dataset, rank=r, world=2) for r in range(2)]
    assert not set(ranks[0].raw(0)["index"].tolist()) & set(ranks[1].raw(0)["index"].tolist())


def test_cameras_are_as_many_as_there_are(tmp_path):
    names = [f"c{i}" for i in range(6)]
    fake.make_dataset(tmp_path / "d", episodes=1, frames=2, cameras=names)
    batch = RobotData(tmp_path / "d", [], 2, 1, 0, progress=False).raw(0)
    assert [key for key in batch if key.startswith("observation.images.")] == [f"observation.images.{c}" for c in names]


def test_wrong_requests(dataset):
    with pytest.raises(BurnishError, match="episode 7"):
        data(dataset, episodes=[7])
    with pytest.raises(BurnishError, match="camera 'wrist'"):
        RobotData(dataset, ["wrist"], 4, 6, 0)


def test_language_batches(questions):
    stream = LanguageData(questions, 4, 0)
    batch = stream.finish(stream.raw(2), 2)
    assert batch[CAMERA].shape == (4, 3, 32, 32) and len(batch["question"]) == len(batch["answer"]) == 4
    again = LanguageData(questions, 4, 0)
    assert again.raw(2)["question"] == batch["question"]
    assert torch.equal(again.raw(2)[CAMERA].permute(0, 3, 1, 2) / 255.0, batch[CAMERA])


def test_language_folder_missing(tmp_path):
    with pytest.raises(BurnishError, match="has no meta.json"):
        LanguageData(tmp_path, 4, 0)


def test_prefetch_keeps_order_and_counts_waiting():
    gate = threading.Event()

    def make(k):
        gate.wait(5)
        time.sleep(0.01 * (k % 3))  # later batches may be ready first
        return {"k": k}

    queue = Prefetch(make, 5, threads=3)
    threading.Timer(0.2, gate.set).start()
    assert [next(queue)["k"] for _ in range(12)] == list(range(5, 17))
    assert queue.waited > 0.1
    queue.close()


def test_prefetch_hands_errors_on():
    def make(k):
        raise BurnishError(f"batch {k} is broken")

    queue = Prefetch(make, 0)
    with pytest.raises(BurnishError, match="batch 0"):
        next(queue)
    queue.close()
