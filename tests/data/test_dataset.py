"""One reader of every LeRobotDataset: what is stored oddly but can be told is read right."""

import copy as copies
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import dataset_fakes as fakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_fakes import DATA, EPISODES, FRONT, INFO, STATS, TASK_TABLE, VIDEO, edit_json, edit_table

from burnish.core.errors import BurnishError
from burnish.core.types import Window
from burnish.data.checks import find_problems
from burnish.data.dataset import convert_command, open_dataset
from burnish.data.frames import open_frames
from burnish.data.inspect import inspect_dataset
from burnish.data.loader import RobotData
from burnish.data.record import encode_video
from burnish.methods.retrieve.ask import make_index
from burnish.runtime.observations import observations

MAKE = {
    "v3": fakes.write_v3, "v2.1": fakes.write_v21, "v2.0": lambda root: fakes.write_v21(root, "v2.0"),
    "pictures": lambda root: fakes.write_v3(root, pictures=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return {name: make(folder / name) for name, make in MAKE.items()}


@pytest.fixture
def copy(good, tmp_path):
    return lambda kind="v3": Path(shutil.copytree(good[kind], tmp_path / "set"))


def read(root, cameras=(), **options):
    return RobotData(root, cameras, 4, 2, 0, augmented=False, progress=False, **options)


def errors(root):
    return "\n".join(f"{p.where}: {p.sentence}" for p in inspect_dataset(root).problems if p.kind == "error")


@pytest.mark.parametrize("kind", MAKE)
def test_every_version_is_read_right_and_nothing_is_wrong_with_it(kind, copy):
    root = copy(kind)
    fakes.assert_reads_right(read(root))
    assert errors(root) == ""
    found = inspect_dataset(root)
    assert found.instructions == {fakes.TASKS[0]: 2, fakes.TASKS[1]: 1}
    assert found.frame_shares[fakes.TASKS[1]] == pytest.approx(6 / 18)


def test_instructions_are_looked_up_by_their_key(copy):
    """Writers without pandas store plain columns; LeRobot reads the row number then."""
    root = copy()
    fakes.write_table(root / TASK_TABLE, {"task": fakes.TASKS[::-1], "task_index": [1, 0]})
    fakes.assert_reads_right(read(root))
    for name in ("__index_level_0__", "language_instruction"):
        pq.write_table(pa.table({"task_index": [0, 1], name: fakes.TASKS}), root / TASK_TABLE)
        fakes.assert_reads_right(read(root))


def test_episodes_are_looked_up_by_their_key(copy):
    """Rows of meta/episodes in another order, in two files, and rows of data in another order."""
    root = copy()
    table = pq.read_table(root / EPISODES)
    pq.write_table(table.take([2, 0]), root / EPISODES)
    pq.write_table(table.take([1]), root / EPISODES.replace("file-000", "file-001"))
    edit_table(root / DATA, lambda c: c.update({k: [v[i] for i in np.random.default_rng(0).permutation(18)]
                                                for k, v in c.items()}))  # fmt: skip
    fakes.assert_reads_right(read(root))
    assert errors(root) == ""


def test_numbers_with_gaps(copy):
    root = copy()

    def renumber(columns):
        columns["episode_index"] = [9 if e == 2 else e for e in columns["episode_index"]]

    edit_table(root / DATA, renumber)
    edit_table(root / EPISODES, renumber)
    data = read(root, episodes=[9])
    assert set(data.episode_index[data.indices]) == {9} and data.chunks(data.indices[-1:])[1].tolist() == [
        [False, True, True, True]
    ]
    assert abs(data.observations(data.indices[:1])[FRONT].float().mean() - fakes.level(2, 0)) < 4
    assert errors(root) == ""
    assert any("7 numbers are missing, first 2" in p.what for p in inspect_dataset(root).problems)
    edit_json(root / INFO, lambda one: one.update(total_episodes=10))
    assert "total_episodes is 10, found 3" in errors(root)


def test_reset_ends_come_from_the_rows(copy):
    """LeRobot's converter once counted dataset_from_index anew in every file; half of the chunks mixed episodes."""
    root = copy("pictures")
    edit_table(root / EPISODES, lambda c: c.update(dataset_from_index=[0, 5, 0], dataset_to_index=[5, 11, 7]))
    fakes.assert_reads_right(read(root))
    assert "episode 2: dataset_from_index and dataset_to_index are 0 and 7, its rows 11 to 18" in errors(root)


def test_a_wrong_data_file_is_named_and_the_rows_found(copy):
    root = copy()
    edit_table(root / EPISODES, lambda c: c.update({"data/file_index": [0, 0, 5]}))
    fakes.assert_reads_right(read(root))
    assert "episode 2: its rows are in data/chunk-000/file-000.parquet, the metadata name" in errors(root)


def test_index_of_a_subset_and_of_a_merger(copy):
    root = copy()
    edit_table(root / DATA, lambda c: c.update(index=[i + 100 * (i > 4) for i in range(18)]))
    fakes.assert_reads_right(read(root))
    edit_table(root / DATA, lambda c: c.update(index=c["frame_index"]))
    fakes.assert_reads_right(read(root))
    assert "index 0 is also in another episode" in errors(root)


@pytest.mark.parametrize("names", [
    None, [], ["x"], [["x", "y", "z"]], {"motors": ["x", "y", "z"]}, {"x": 0, "y": 1, "z": 2}, {"motors": 3}, "xyz",
    [1, 2, 3], {"arm": {"joints": ["x", "y"]}, "hand": ["z"]},
])  # fmt: skip
def test_names_in_every_form(names, copy):
    root = copy()
    edit_json(root / INFO, lambda one: one["features"]["action"].update(names=names))
    edit_json(root / INFO, lambda one: one["features"][FRONT].update(names=names))
    found = inspect_dataset(root)
    told = [one.name for one in found.actions]
    assert told in (["x", "y", "z"], ["0", "1", "2"], ["1", "2", "3"]) and found.ok
    assert (told == ["x", "y", "z"]) == ("z" in str(names) and names != "xyz")
    fakes.assert_reads_right(read(root))


@pytest.mark.parametrize("shape", [[3, 32, 32], [32, 32, 3]])
def test_channels_first_or_last(shape, copy):
    root = copy()
    edit_json(root / INFO, lambda one: one["features"][FRONT].update(shape=shape, names=["height", "width", "channel"]))
    assert open_dataset(root).features[FRONT]["shape"] == (32, 32, 3)
    fakes.assert_reads_right(read(root))


def test_stray_and_hidden_files_are_not_read(copy):
    root = copy()
    for name in (
        "._file-000.parquet",
        ".ipynb_checkpoints/file-000.parquet",
        "file-000 (copy).parquet",
        "backup.parquet",
    ):
        for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
            path = root / folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"no table" if name.startswith(".") else (root / folder / "file-000.parquet").read_bytes())
    fakes.assert_reads_right(read(root))
    found = inspect_dataset(root)
    assert found.ok
    assert any(p.where == "data/chunk-000/backup.parquet" and "2 such files" in p.what for p in found.problems)


def test_quantiles_are_those_of_the_rows(copy):
    """LeRobot stores means of the episodes', which leave out most where the arm is elsewhere in each."""
    dataset, actions = open_dataset(copy()), np.array([fakes.action(*at) for at in fakes.FRAMES])
    middle = np.median(actions, 0).tolist()
    edit_json(dataset.root / STATS, lambda one: one["action"].update(q01=middle, q99=middle))
    for found in (dataset, open_dataset(dataset.root)):
        for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            np.testing.assert_allclose(found.stats["action"][name], np.quantile(actions, q, axis=0), rtol=1e-6)
    assert any("outside the stored q01" in one.what for one in inspect_dataset(dataset.root).problems)


def test_a_sentence_may_hold_any_character(copy):
    root = copy("v2.1")
    tasks = [{"task_index": 0, "task": "lift\u2028the \x85 cube"}, {"task_index": 1, "task": "open"}]
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in tasks))
    assert read(root).tasks == {0: "lift\u2028the \x85 cube", 1: "open"}


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("  ", "empty"), ("17", "the number 17")])
def test_an_instruction_that_is_no_sentence_is_warned_about(text, said, copy, caplog):
    root = copy()
    edit_table(root / TASK_TABLE, lambda c: c.update(task=[text, "open"]))
    with caplog.at_level("WARNING", "burnish"):
        read(root)
    assert f"an instruction is {said}" in caplog.text


def test_every_instruction_of_an_episode_is_listed(copy):
    root = copy()
    edit_table(root / DATA, lambda c: c.update(task_index=[0, 0, 1, 1, 1] + [1] * 6 + [0] * 7))
    found = inspect_dataset(root)
    assert found.instructions == {fakes.TASKS[0]: 2, fakes.TASKS[1]: 2}
    assert found.frame_shares == {fakes.TASKS[0]: 9 / 18, fakes.TASKS[1]: 9 / 18}


def test_a_long_episode_has_no_timestamp_error(tmp_path):
    """Beyond 2,048 s neighbouring float32 numbers are more than LeRobot's tolerance apart."""
    root = fakes.write_v3(tmp_path / "set", pictures=True)
    edit_json(root / INFO, lambda one: one["features"].pop(FRONT))
    count = 90_000
    columns = {"action": np.random.default_rng(0).normal(size=(count, 3)), "observation.state": np.zeros((count, 4))}
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1), pa.float32()), v.shape[1])
               for name, v in columns.items()}  # fmt: skip
    columns |= {
        "frame_index": np.arange(count),
        "index": np.arange(count),
        "timestamp": np.float32(np.arange(count) / 10),
    }
    columns |= {"episode_index": np.zeros(count, int), "task_index": np.zeros(count, int)}
    pq.write_table(pa.table(columns), root / DATA)
    edit_table(root / EPISODES, lambda c: [c.__setitem__(k, v[:1]) for k, v in c.items()])
    edit_table(root / EPISODES, lambda c: c.update(length=[count], dataset_to_index=[count]))
    assert "timestamps" not in str(find_problems(open_dataset(root)))


def test_a_camera_of_another_name_is_left_out_for_its_name(tmp_path, caplog):
    root = fakes.write_v3(tmp_path / "set", pictures=True)
    edit_json(root / INFO, lambda one: one["features"].update({"wrist": dict(one["features"][FRONT])}))
    cells = [{"bytes": fakes.png(np.zeros((32, 32, 3), np.uint8)), "path": None} for _ in range(18)]
    edit_table(root / DATA, lambda c: c.update({"wrist": cells}))
    with caplog.at_level("WARNING", "burnish"), pytest.raises(BurnishError, match="wrist would be"):
        read(root)
    assert "do not start with 'observation.': wrist" in caplog.text and "no colours" not in caplog.text


def test_depth_is_left_out_with_a_word(tmp_path, caplog):
    root, deep = fakes.write_v3(tmp_path / "set", pictures=True), "observation.images.depth"
    edit_json(root / INFO, lambda one: one["features"].update(
        {deep: {"dtype": "image", "shape": [32, 32, 1], "names": None, "info": {"is_depth_map": True}}}))  # fmt: skip
    cells = [{"bytes": fakes.png(np.full((32, 32), 500 + i, np.uint16)), "path": None} for i in range(18)]
    edit_table(root / DATA, lambda c: c.update({deep: cells}))
    with caplog.at_level("WARNING", "burnish"):
        data = read(root)
    assert data.cameras == [FRONT] and deep in caplog.text
    fakes.assert_reads_right(data)
    found = inspect_dataset(root)
    view = next(view for view in found.views if view.depth)
    assert found.ok and view.orientation == "depth, 511 to 517 in its own unit" or "depth, 5" in view.orientation
    assert not any(p.where == deep and p.kind == "warning" for p in found.problems)
    with pytest.raises(BurnishError, match="'depth', which shows no colours"):
        read(root, ["depth"])


def test_openpi_names_are_mapped(tmp_path):
    root = fakes.write_v3(tmp_path / "set", pictures=True)
    fakes.openpi(root)
    found = inspect_dataset(root)
    assert [one.name for one in found.actions] == ["a0", "a1", "a2"] and found.views[0].size == (32, 32)
    (problem,) = [p for p in found.problems if p.kind == "error"]
    assert "actions would be action" in problem.what and problem.fix.startswith("--data.columns=")
    columns = {"action": "actions", "observation.state": "state", FRONT: "image"}
    fakes.assert_reads_right(read(root, meta=open_dataset(root, columns)))
    import shlex

    import yaml

    (option,) = shlex.split(problem.fix)
    proposed = yaml.safe_load(option.partition("=")[2])
    assert proposed == {"action": "actions", "observation.state": "state", "observation.images.image": "image"}


def test_groups_are_joined_in_order(tmp_path):
    root = fakes.write_v3(tmp_path / "set")
    groups = {"action.arm": slice(0, 2), "action.hand": slice(2, 3)}

    def rename(one):
        whole = one["features"].pop("action")
        for name, part in groups.items():
            one["features"][name] = whole | {"shape": [len(whole["names"][part])], "names": whole["names"][part]}

    edit_json(root / INFO, rename)

    def split(one):
        whole = one.pop("action")
        for name, part in groups.items():
            one[name] = {key: figure if key == "count" else figure[part] for key, figure in whole.items()}

    edit_json(root / STATS, split)
    table = pq.read_table(root / DATA)
    action = table["action"].to_pylist()
    parts = {"action.arm": pa.array([a[:2] for a in action]), "action.hand": pa.array([a[2] for a in action])}
    for name, column in parts.items():
        table = table.append_column(name, column)
    pq.write_table(table.drop_columns("action"), root / DATA)
    with pytest.raises(BurnishError, match=r"--data.columns='\{action: \[action.arm, action.hand\]\}'"):
        read(root)
    dataset = open_dataset(root, {"action": ["action.arm", "action.hand"]})
    assert dataset.features["action"]["names"] == ["action.arm.a0", "action.arm.a1", "action.hand.a2"]
    fakes.assert_reads_right(read(root, meta=dataset))
    assert dataset.stats["action"]["max"].tolist() == pytest.approx([2.0, 6.0, 2.6])


def test_episodes_of_a_partial_download(copy):
    """Files of episodes that are not chosen may be missing, and damaged."""
    root = copy("v2.1")
    (root / "data/chunk-000/episode_000000.parquet").unlink()
    (root / f"videos/chunk-000/{FRONT}/episode_000001.mp4").write_bytes(b"none")
    recipes = open_dataset(root)
    recipes.named = "data.episodes"
    with pytest.raises(BurnishError, match=r"episode_000000.parquet is missing.*--data.episodes=\[1,2\]"):
        read(root, meta=recipes)
    with pytest.raises(BurnishError, match=r"episode_000001.mp4 is unreadable"):
        read(root, episodes=[1, 2])
    fakes.assert_reads_right(read(root, episodes=[2]))
    with pytest.raises(BurnishError, match=r"episode_000001.mp4 is unreadable"):
        read(root, episodes=[1])  # the frames that were decoded before are not taken for those of episode 1
    fakes.assert_reads_right(read(root, episodes=[2]))


@pytest.mark.parametrize("kind", ["v3", "v2.1", "pictures"])
def test_frames_decoded_on_demand_equal_decoded_ones(kind, copy):
    root = copy(kind)
    kept = read(root).frames.arrays[FRONT]
    root = Path(shutil.copytree(root, root.parent / "other", ignore=shutil.ignore_patterns(".frames")))
    streamed = read(root, cache_gb=0.0).frames.arrays[FRONT]
    assert not (root / ".frames").exists() and streamed.shape == kept.shape and len(streamed) == 18
    order = np.random.default_rng(0).integers(0, 18, (6, 5))
    assert np.array_equal(streamed[order], kept[order]) and np.array_equal(streamed[7], kept[7])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(copies.deepcopy(streamed).__getitem__, order))
    assert np.array_equal(np.stack(found), kept[order])


def test_a_few_observations_decode_no_whole_data_set(copy, caplog):
    """`burnish policy profile --data` and `verify` look at some frames; nothing is kept, and nothing said of it."""
    caplog.set_level("INFO", "burnish")
    root = copy()
    policy = SimpleNamespace(cameras=("front",), chunk_size=4, window=Window(), device=torch.device("cpu"))
    found = observations(policy, 3, root)
    assert found[FRONT].shape == (3, 3, fakes.SIZE, fakes.SIZE) and found["action"].shape == (3, 4, 3)
    assert not (root / ".frames").exists() and "cache_gb" not in caplog.text


def test_commands_that_take_no_map_read_other_names_by_the_one_that_is_proposed(tmp_path):
    """Their error named an option, --data.columns, that they do not have."""
    fakes.openpi(fakes.write_v3(tmp_path / "set", pictures=True))
    policy = SimpleNamespace(cameras=("image",), chunk_size=4, window=Window(), device=torch.device("cpu"))
    found = observations(policy, 3, tmp_path / "set")
    assert found["action"].shape == (3, 4, 3) and found["observation.state"].shape == (3, 4)
    made = make_index(tmp_path / "set", "pixels", tmp_path / "index", progress=False)
    assert made.about["cameras"] == ["image"] and len(made.values) == 18


@pytest.mark.parametrize("broken", ["table", "pictures"])
def test_commands_that_take_no_episodes_advise_none_to_leave_out(copy, broken):
    root = copy("pictures")
    column, value = ("action", [0.0, float("nan"), 0.0]) if broken == "table" else (FRONT, {"bytes": b"", "path": None})
    edit_table(root / DATA, lambda columns: columns[column].__setitem__(7, value))
    policy = SimpleNamespace(cameras=("front",), chunk_size=4, window=Window(), device=torch.device("cpu"))
    for call in (lambda: observations(policy, 18, root), lambda: make_index(root, "pixels", root.parent / "i")):
        with pytest.raises(BurnishError) as refusal:
            call()
        assert "data.episodes" not in str(refusal.value) and "burnish data inspect" in str(refusal.value)


def test_frames_are_kept_at_the_size_that_the_policy_sees(tmp_path):
    from lerobot.policies.common.vla_utils import resize_with_pad

    root = fakes.write_v3(tmp_path / "set")
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 255, (18, 6, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)  # 48 x 64
    (root / VIDEO).write_bytes(encode_video(wide, fakes.FPS))
    edit_json(root / INFO, lambda one: one["features"][FRONT].update(shape=[48, 64, 3]))
    full = read(root).frames.arrays[FRONT]
    small = read(root, seen=40).frames.arrays[FRONT]
    assert full.shape == (18, 48, 64, 3) and small.shape == (18, 30, 40, 3)

    def seen(frames):
        return resize_with_pad(torch.from_numpy(frames[:]).permute(0, 3, 1, 2).float(), 40, 40, pad_value=0)

    assert (seen(np.array(small)) - seen(np.array(full))).abs().max() <= 0.5001
    assert read(root, seen=40, cache_gb=0.0).frames.arrays[FRONT][3].tolist() == small[3].tolist()
    assert read(root, seen=400).frames.arrays[FRONT].shape == full.shape  # never enlarged


def test_earlier_states_leave_a_shared_cache(tmp_path):
    one, two, cache = fakes.write_v3(tmp_path / "one"), fakes.write_v21(tmp_path / "two"), tmp_path / "cache"
    for root in (one, two):
        read(root, cache_dir=str(cache))
    assert len(list(cache.glob("*.npy"))) == 2
    edit_json(one / INFO, lambda info: info.update(robot_type="other"))
    fakes.assert_reads_right(read(one, cache_dir=str(cache)))
    assert len(list(cache.glob("*.npy"))) == len(list(cache.glob("*.json"))) == 2


def test_a_data_set_that_may_not_be_written(copy, monkeypatch, caplog, tmp_path):
    root, access = copy(), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (mode != os.W_OK or path != root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with caplog.at_level("WARNING", "burnish"):
        fakes.assert_reads_right(read(root))
    assert "data.cache_dir" in caplog.text and list((tmp_path / "home/burnish/frames").glob("*.npy"))
    assert not (root / ".frames").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(BurnishError, match="file"):
        open_frames(root, [FRONT], cache_dir=tmp_path / "file")


def test_version_2_names_a_converter_that_runs(copy, monkeypatch):
    """LeRobot reads what its converter makes of the folder, and so do we."""
    import runpy
    import shlex
    import sys

    root = copy("v2.1")
    (hint,) = [p for p in inspect_dataset(root).problems if p.where == "version"]
    assert hint.fix == convert_command(root)
    python, module, name, *words = shlex.split(hint.fix)
    assert (python, module) == ("python", "-m") and "--push-to-hub=false" in words
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_module(name, run_name="__main__")
    assert open_dataset(root).version == "v3.0"
    fakes.assert_reads_right(read(root))


def test_a_trimmed_video_is_read_as_players_show_it(copy, tmp_path):
    """An edit list cuts the first frames away, which are still in the file: nobody counts or shows them."""
    import io

    import av

    root, extra = copy("v3"), 3  # the first frame shown needs the one before it
    frames = [np.full((fakes.SIZE, fakes.SIZE, 3), 250, np.uint8)] * extra
    frames += [fakes.picture(*at) for at in fakes.FRAMES]
    with (
        av.open(io.BytesIO(encode_video(np.stack(frames), fakes.FPS))) as source,
        av.open(str(root / VIDEO), "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = packet.pts - round(extra / fakes.FPS / packet.time_base)
                target.mux(packet)
    with av.open(str(root / VIDEO)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_discard for packet in packets] == [True] + [False] * len(fakes.FRAMES)
    assert errors(root) == ""
    fakes.assert_reads_right(read(root))
    fakes.assert_reads_right(read(root, cache_gb=0.0))  # decoded on demand
