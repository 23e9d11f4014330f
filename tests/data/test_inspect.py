"""Data sets made on the spot, whole and damaged in every way that a practitioner meets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish import BurnishError, inspect_dataset
from burnish.cli.main import main
from burnish.data.inspect import find_gripper
from burnish.data.inspect_views import orientation_hint
from burnish.evaluate.simulators import write_video

FPS, LENGTHS = 10, (14, 9, 12)
NAMES = ["x", "y", "z", "gripper"]
VIEW = "observation.images.front"
INFO, STATS = "meta/info.json", "meta/episodes_stats.jsonl"


def episode_arrays(index: int) -> dict[str, np.ndarray]:
    """Relative actions; the gripper command is -1 (open) in the first half, +1 (closed) after it."""
    rng = np.random.default_rng(index)
    n = LENGTHS[index]
    action = rng.normal(size=(n, 4)).astype(np.float32)
    action[:2, :3] = 0.0
    action[:, 3] = np.where(np.arange(n) < n // 2, -1.0, 1.0)
    state = np.cumsum(action, 0).astype(np.float32)
    return {"action": action, "observation.state": state}


def frames_of(index: int) -> np.ndarray:
    """[n, 48, 64, 3] uint8 with detail in the lower half and a marker that moves."""
    rng = np.random.default_rng(100 + index)
    frames = np.full((LENGTHS[index], 48, 64, 3), 150, np.uint8)
    frames[:, 28:] = np.kron(rng.integers(0, 255, (5, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    for t, frame in enumerate(frames):
        frame[4:12, 4 * t : 4 * t + 8] = 20
    return frames


def features(dtype: str) -> dict:
    return {
        VIEW: {"dtype": dtype, "shape": [48, 64, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [4], "names": NAMES},
        "action": {"dtype": "float32", "shape": [4], "names": NAMES},
    }


def write_v21(root: Path) -> Path:
    """The older layout by hand: one parquet file and one mp4 for each episode, JSON lines."""
    index_columns = {name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index")}
    index_columns |= {"task_index": {"dtype": "int64", "shape": [1]}, "timestamp": {"dtype": "float32", "shape": [1]}}
    info = {
        "codebase_version": "v2.1", "fps": FPS, "features": features("video") | index_columns, "chunks_size": 1000,
        "total_episodes": 3, "total_frames": sum(LENGTHS),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{VIEW}"):
        (root / folder).mkdir(parents=True)
    (root / INFO).write_text(json.dumps(info))
    tasks = ["lift the red cube", "Lift the red cube."]
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    episodes, stats = [], []
    for index, length in enumerate(LENGTHS):
        arrays = episode_arrays(index)
        episodes.append({"episode_index": index, "length": length, "tasks": [tasks[index // 2]]})
        stats.append({"episode_index": index, "stats": {name: stats_of(array) for name, array in arrays.items()}})
        write_episode(root, index, arrays)
        write_video(root / f"videos/chunk-000/{VIEW}/episode_{index:06d}.mp4", frames_of(index), FPS)
    write_lines(root / "meta/episodes.jsonl", episodes)
    write_lines(root / STATS, stats)
    return root


def write_episode(root: Path, index: int, arrays: dict[str, np.ndarray], **changes) -> None:
    length = len(arrays["action"])
    columns = {name: pa.array(array.tolist(), pa.list_(pa.float32())) for name, array in arrays.items()}
    columns |= {
        "timestamp": pa.array((np.arange(length) / FPS).astype(np.float32)),
        "frame_index": pa.array(np.arange(length)),
        "episode_index": pa.array(np.full(length, index)),
        "index": pa.array(np.arange(length) + sum(LENGTHS[:index])),
        "task_index": pa.array(np.full(length, index // 2)),
    }
    pq.write_table(pa.table(columns | changes), root / f"data/chunk-000/episode_{index:06d}.parquet")


def stats_of(array: np.ndarray) -> dict:
    stats = {key: getattr(array, key)(0).tolist() for key in ("min", "max", "mean", "std")}
    return stats | {"count": [len(array)]}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def v21(tmp_path_factory) -> Path:
    return write_v21(tmp_path_factory.mktemp("v21") / "set")


@pytest.fixture(scope="module")
def v30(tmp_path_factory) -> Path:
    """The same data through LeRobot's own writer."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("v30") / "set"
    made = LeRobotDataset.create(
        "local/set", fps=FPS, root=root, features=features("video"), rgb_encoder=RGBEncoderConfig(vcodec="h264")
    )
    for index in range(3):
        arrays, frames = episode_arrays(index), frames_of(index)
        for t in range(LENGTHS[index]):
            row = {name: array[t] for name, array in arrays.items()}
            made.add_frame(row | {VIEW: frames[t], "task": "lift the red cube"})
        made.save_episode()
    made.finalize()
    return root


@pytest.fixture
def broken(v21, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(v21, tmp_path / "set"))


def whats(root: Path, kind: str = "error") -> str:
    return "\n".join(f"{p.where}: {p.what}" for p in inspect_dataset(root).problems if p.kind == kind)


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_both_versions_tell_the_same(version, request):
    found = inspect_dataset(request.getfixturevalue(version))
    action = np.concatenate([episode_arrays(i)["action"] for i in range(3)])
    assert found.ok, found.problems
    assert found.fps == FPS and found.lengths.tolist() == list(LENGTHS)
    assert [d.name for d in found.actions] == NAMES
    assert found.actions[1].low == pytest.approx(action[:, 1].min())
    assert found.actions[1].std == pytest.approx(action[:, 1].std(), rel=1e-5)
    assert all(d.outside["min_max"] == 0 for d in found.actions)
    assert found.gripper.name == "gripper" and found.gripper.binary_share == 1.0
    assert found.idle_share == pytest.approx(6 / 35) and found.idle_start == 2
    assert found.control == "relative"
    (view,) = found.views
    assert view.size == (48, 64) and len(view.thumbnails) == 3
    assert np.abs(view.thumbnails[0].astype(int) - frames_of(1)[0]).mean() < 12
    assert "bottom" in view.orientation and "upside" not in view.orientation
    assert sum(found.instructions.values()) == 3


def test_quantiles_of_lerobot_are_measured_not_believed(v30):
    """LeRobot averages the quantiles of episodes, so more than 2 % lie outside them; the table has to show it."""
    stats = json.loads((v30 / "meta/stats.json").read_text())["action"]
    action = np.concatenate([episode_arrays(i)["action"] for i in range(3)])[:, 0]
    expected = np.mean((action < stats["q01"][0] - 1e-4) | (action > stats["q99"][0] + 1e-4))
    assert inspect_dataset(v30).actions[0].outside["quantiles"] == pytest.approx(expected)


def test_command_prints_and_writes_a_page(v21, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["data", "inspect", str(v21), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    for word in ("v2.1", "3, 35 frames", "gripper", "48x64", "outside min/max", "differ in case"):
        assert word in text
    html = page.read_text()
    assert html.count("data:image/png") == 3 and "http" not in html.replace("data:", "")


def test_as_json(broken, v21, capsys):
    found = inspect_dataset(v21, quick=True)
    next((broken / "videos").rglob("*.mp4")).unlink()
    assert main(["data", "inspect", str(v21), str(broken), "--quick", "--json"]) == 1
    whole, damaged = map(json.loads, capsys.readouterr().out.splitlines())
    assert whole["ok"] and whole["lengths"] == found.lengths.tolist() and whole["instructions"] == found.instructions
    assert [view["name"] for view in whole["views"]] == [view.name for view in found.views]
    assert not damaged["ok"] and any(problem["kind"] == "error" for problem in damaged["problems"])


def test_embedded_images(v30, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path / "images"
    made = LeRobotDataset.create("local/set", fps=FPS, root=root, features=features("image"), use_videos=False)
    for t in range(LENGTHS[0]):
        row = {name: array[t] for name, array in episode_arrays(0).items()}
        made.add_frame(row | {VIEW: frames_of(0)[t], "task": "lift"})
    made.save_episode()
    made.finalize()
    (view,) = inspect_dataset(root).views
    assert (view.thumbnails[0] == frames_of(0)[0]).all()


VIDEO = f"videos/chunk-000/{VIEW}/episode_000001.mp4"


def test_missing_video(broken):
    (broken / VIDEO).unlink()
    assert f"{VIDEO}: missing" in whats(broken)


def test_unreadable_video(broken):
    (broken / VIDEO).write_bytes(b"\0" * 2000)
    assert f"{VIDEO}: unreadable" in whats(broken)


def test_video_cut_short_on_disk(broken):
    content = (broken / VIDEO).read_bytes()
    (broken / VIDEO).write_bytes(content[: len(content) // 2])
    assert VIDEO in whats(broken)


def test_video_with_too_few_frames(broken):
    write_video(broken / VIDEO, frames_of(1)[:5], FPS)
    assert f"{VIDEO}: too short: 5 frames, 9 frames" in whats(broken)


def test_wrong_image_size(broken):
    edit_info(broken, lambda info: info["features"][VIEW].update(shape=[96, 96, 3]))
    assert "images are 48x64, meta/info.json says 96x96" in whats(broken)


def test_wrong_frame_rate(broken):
    edit_info(broken, lambda info: info.update(fps=30))
    assert "10 frames a second, meta/info.json says 30" in whats(broken)
    assert "not at frame / fps" in whats(broken)


def test_missing_statistics(broken):
    (broken / STATS).unlink()
    assert "meta/episodes_stats.jsonl: missing" in whats(broken)


def test_statistics_of_other_data(broken):
    rows = [json.loads(line) for line in (broken / STATS).read_text().splitlines()]
    for row in rows:
        row["stats"]["action"]["max"] = [0.5] * 4
    write_lines(broken / STATS, rows)
    assert "stored max of dimension" in whats(broken)
    assert inspect_dataset(broken).actions[0].outside["min_max"] > 0.05


def test_statistics_of_another_dimension(broken):
    rows = [json.loads(line) for line in (broken / STATS).read_text().splitlines()]
    for row in rows:
        row["stats"]["action"] = {k: v[:3] for k, v in row["stats"]["action"].items()}
    write_lines(broken / STATS, rows)
    assert "statistics do not fit 4 dimensions" in whats(broken)


def test_nan(broken):
    arrays = episode_arrays(1)
    arrays["action"][3, 2] = np.nan
    write_episode(broken, 1, arrays)
    assert "action: 1 NaN or infinite, first in z of episode 1 frame 3" in whats(broken)


def test_wrong_action_dimension(broken):
    arrays = episode_arrays(1)
    arrays["action"] = arrays["action"][:, :3]
    write_episode(broken, 1, arrays)
    with pytest.raises(BurnishError, match=r"episode_000001\.parquet: action has 3 numbers a frame; expected 4"):
        inspect_dataset(broken)


def test_rows_and_metadata_disagree(broken):
    arrays = {name: array[:-2] for name, array in episode_arrays(1).items()}
    write_episode(broken, 1, arrays)
    assert "episode 1: 7 frames in the data, 9 in the metadata" in whats(broken)


def test_irregular_timestamps(broken):
    stamps = (np.arange(9) / FPS).astype(np.float32)
    stamps[4] += 0.05
    write_episode(broken, 1, episode_arrays(1), timestamp=pa.array(stamps))
    assert "timestamps, first in episode 1: 1 frames in 1 episodes" in whats(broken)


def test_instruction_without_a_text(broken):
    write_episode(broken, 1, episode_arrays(1), task_index=pa.array(np.full(9, 7)))
    assert "task_index: no instruction for 7" in whats(broken)


def test_duplicate_episode(broken):
    """Two recordings with the same numbers: episode 0 again under index 2, with its length set right."""
    write_episode(broken, 2, episode_arrays(0))
    assert "episodes 0, 2: identical" in whats(broken, "warning")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / INFO).unlink(), r"no meta/info\.json"),
        (lambda root: (root / INFO).write_text("{"), r"info\.json is not JSON"),
        (lambda root: edit_info(root, lambda info: info.pop("fps")), r"info\.json lacks fps"),
        (lambda root: edit_info(root, lambda info: info.update(codebase_version="v1.6")), "version v1.6; expected"),
        (lambda root: (root / "meta/episodes.jsonl").write_text('{"length": 3}\n'), "line 1 lacks episode_index"),
        (lambda root: (root / "meta/tasks.jsonl").unlink(), r"tasks\.jsonl is missing"),
        (lambda root: (root / "data/chunk-000/episode_000001.parquet").unlink(), r"000001\.parquet is missing"),
        (lambda root: (root / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1"), r"000001\.parquet cannot"),
        (lambda root: shutil.rmtree(root), "no data set at"),
    ],
)
def test_malformed_data_sets_get_one_clear_line(broken, damage, message, capsys):
    damage(broken)
    with pytest.raises(BurnishError, match=message):
        inspect_dataset(broken)
    assert main(["data", "inspect", str(broken)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_hub_name_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BurnishError, match="not fetched.*try: hf download owner/set --repo-type dataset --local-dir set"
    ):
        inspect_dataset(Path("owner/set"))


def test_malformed_v30(v30, tmp_path):
    root = Path(shutil.copytree(v30, tmp_path / "set"))
    (root / "meta/tasks.parquet").write_bytes(b"nothing")
    with pytest.raises(BurnishError, match=r"tasks\.parquet cannot be read"):
        inspect_dataset(root)
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(BurnishError, match="episodes is missing"):
        inspect_dataset(root)


def edit_info(root: Path, change) -> None:
    info = json.loads((root / INFO).read_text())
    change(info)
    (root / INFO).write_text(json.dumps(info))


def test_gripper_sign_from_the_fingers():
    command = np.tile(np.repeat([-1.0, 1.0], 20), 5)
    width = np.convolve(np.where(command < 0, 0.04, 0.0), np.ones(4) / 4)[: len(command)]
    state = np.stack([width, -width], 1)
    action = np.stack([np.random.default_rng(0).normal(size=200), command], 1)
    found = find_gripper(["0", "1"], action, ["finger_left", "finger_right"], state, np.array([0]))
    assert found.name == "dimension 1" and found.opens == "-" and "correlation" in found.evidence


def test_no_gripper():
    action = np.random.default_rng(0).normal(size=(200, 3))
    assert find_gripper(["0", "1", "2"], action, [], None, np.array([0])) is None


def test_orientation_hint_notices_an_upside_down_view():
    frames = list(frames_of(0))
    assert "upside down" in orientation_hint([frame[::-1] for frame in frames])
    assert "bottom half" in orientation_hint(frames)
    assert "blank" in orientation_hint([np.full((48, 64, 3), 9, np.uint8)])
