"""Data at real size: resuming a mixture, the room of decoded frames, waiting where nothing is kept, and replay.

The large data set is two cameras of 480x640 pixels at 30 frames a second, AV1 as LeRobot encodes it. Only two clips of
250 frames are encoded for each camera; the video of every episode is a hard link to one of them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.train import make_frames

CAMERAS, SIZE, FPS, LENGTH, EPISODES = ("front", "wrist"), (480, 640), 30, 250, 100
SEEN, STEPS, BATCH = 256, 20, 2
REPLAY = Path("results/tabletop/replay.json")


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and what stands behind them.

    Figures:
        mix_resume_equal: a training on two data sets that was cut ends with the very weights of one that was not, and
            1, 2 and 4 ranks read one order.
        cached_gb_25k_frames: size on disk of the decoded frames of both cameras at 256 px.
        data_wait_share_streaming: share of the step that waits for frames where none are kept, at SmolVLA's size, batch
            2, 256 px, the expert trained; after the first step. data_wait_share_cached: the same from kept ones.
        replay_kept: success on the old task after tuning on the new one with replay over without
            (recipes/tabletop/replay.yaml), where its result is there.
    """
    from burnish.train.setup import own_accelerate_state

    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {"data": {"batch_size": BATCH, "steps": STEPS, "image_size": SEEN}}
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as temporary, own_accelerate_state():
        folder = Path(temporary)
        figures["mix_resume_equal"] = mix_resume_equal(folder / "mix")
        root = make_large(folder / "large", 4 if args.quick else EPISODES)
        policy, parameters = make_policy(folder, tiny=args.quick)
        frames = (4 if args.quick else EPISODES) * LENGTH
        detail["data"] |= {"frames": frames, "parameters": parameters}
        for name, room in (("streaming", 0.0), ("cached", 12.0)):
            _say(f"training at SmolVLA's size, {name}")
            begin = time.perf_counter()
            found = _train(folder / name, root, policy, room, 4 if args.quick else STEPS)
            figures[f"data_wait_share_{name}"] = found.pop("after_first")
            detail["data"][name] = found | {"seconds_in_all": time.perf_counter() - begin}
        kept = sum(file.stat().st_size for file in (root / ".frames").glob("*.npy")) / 1e9
        figures["cached_gb_25k_frames"] = kept * EPISODES * LENGTH / frames
    replay = replay_kept()
    if replay:
        figures["replay_kept"] = replay["ratio"]
        detail["replay"] = replay
    return figures, detail


def _say(text: str) -> None:
    print(f"python -m bench scale: {text}", file=sys.stderr)


def mix_resume_equal(folder: Path) -> bool:
    """Whether a cut training on two data sets ends as an uncut one, and ranks read one order."""
    from unittest.mock import patch

    from safetensors.torch import load_file

    from burnish.core.recipe import load_recipe
    from burnish.data.mixed import MixSampler
    from burnish.train import loop
    from workshop.tiny import make_tiny

    roots = [make_frames(folder / name, episodes=2, frames=20, size=32) for name in ("new", "old")]
    policy, step = make_tiny("smolvla", folder / "tiny", cameras=("front",), image_size=32), loop.train_step

    def run(output: str) -> Path:
        mix = json.dumps([{"root": str(roots[1]), "weight": 0.5}])
        recipe = load_recipe(None, [
            f"--data.root={roots[0]}", f"--data.mix={mix}", f"--output={folder / output}", f"--policy.path={policy}",
            "--train.steps=8", "--train.save_every=2", "--train.batch_size=6", "--train.self_check=false",
        ])  # fmt: skip
        return loop.train(recipe, progress=False).policy

    def dying(training: Any, *given: Any, **options: Any) -> dict[str, float]:
        edits = step(training, *given, **options)
        if training.step == 5:
            raise InterruptedError
        return edits

    whole = run("whole")
    try:
        with patch.object(loop, "train_step", dying):
            run("cut")
    except InterruptedError:
        pass
    one, two = (load_file(place / "model.safetensors") for place in (whole, run("cut")))
    counts, weights = [40, 40], [1.0, 0.5]
    orders = [
        np.concatenate([MixSampler(counts, weights, 24 // world, 0, rank, world).indices(7) for rank in range(world)])
        for world in (1, 2, 4)
    ]
    return all(bool((one[name] == two[name]).all()) for name in one) and all((orders[0] == o).all() for o in orders)


def make_large(root: Path, episodes: int) -> Path:
    """A LeRobotDataset v3 of `episodes` x 250 frames from two cameras, see the head of this file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from burnish.core.files import write_json

    rng, count = np.random.default_rng(0), episodes * LENGTH
    numbers = {name: np.cumsum(rng.normal(size=(count, width)), 0).astype(np.float32) % 3
               for name, width in (("observation.state", 8), ("action", 7))}  # fmt: skip
    index, episode = np.arange(count), np.repeat(np.arange(episodes), LENGTH)
    video = {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {f"observation.images.{camera}": video for camera in CAMERAS}
    features |= {name: {"dtype": "float32", "shape": [one.shape[1]], "names": None} for name, one in numbers.items()}
    whole = ("frame_index", "episode_index", "index", "task_index")
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in whole}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    write_json(root / "meta/info.json", {
        "codebase_version": "v3.0", "fps": FPS, "features": features, "chunks_size": 1000, "robot_type": "bench",
        "total_episodes": episodes, "total_frames": count, "data_path": f"data/{place}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4",
    })  # fmt: skip
    write_json(root / "meta/stats.json", {
        name: {key: getattr(one, key)(0).tolist() for key in ("min", "max", "mean", "std")}
        for name, one in numbers.items()
    })  # fmt: skip
    one, files = [0] * episodes, list(range(episodes))
    table = {
        "episode_index": files, "length": [LENGTH] * episodes, "tasks": [["pick up the cube"]] * episodes,
        "data/chunk_index": one, "data/file_index": one, "dataset_from_index": [e * LENGTH for e in files],
        "dataset_to_index": [(e + 1) * LENGTH for e in files],
    }  # fmt: skip
    for camera in CAMERAS:
        key = f"videos/observation.images.{camera}"
        table |= {f"{key}/chunk_index": one, f"{key}/file_index": files, f"{key}/from_timestamp": [0.0] * episodes,
                  f"{key}/to_timestamp": [LENGTH / FPS] * episodes}  # fmt: skip
        folder = root / key / "chunk-000"
        folder.mkdir(parents=True)
        for e in files:
            path = folder / f"file-{e:03d}.mp4"
            if e < 2:
                _encode(path, rng)
            else:
                os.link(folder / f"file-{e % 2:03d}.mp4", path)
    frames = {name: list(values) for name, values in numbers.items()} | {
        "timestamp": pa.array((index % LENGTH / FPS).astype(np.float32)), "frame_index": index % LENGTH,
        "episode_index": episode, "index": index, "task_index": np.zeros(count, np.int64),
    }  # fmt: skip
    tasks = {"task_index": [0], "task": ["pick up the cube"]}
    for name, content in (("meta/tasks.parquet", tasks), ("meta/episodes/chunk-000/file-000.parquet", table),
                          ("data/chunk-000/file-000.parquet", frames)):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(content), root / name)
    return root


def _encode(path: Path, rng: np.random.Generator) -> None:
    """A clip: a textured table over which a lit square moves."""
    import av

    coarse = rng.integers(60, 200, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
    table = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options={"preset": "12", "crf": "30", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for k in range(LENGTH):
            picture = table.copy()
            picture[100 + k : 180 + k, 2 * k : 2 * k + 80] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def make_policy(folder: Path, tiny: bool) -> tuple[Path, int]:
    """A SmolVLA of random weights that sees both cameras at 256 px; its folder and number of parameters."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    from bench.memory import SIZES
    from burnish.policies import create_policy
    from burnish.policies.keys import ACTION, STATE
    from workshop.tiny import build_vlm, default_statistics

    edge = 64 if tiny else SEEN
    build_vlm(folder / "vlm", **(SIZES["tiny"] if tiny else SIZES["smolvla"])["vlm"])
    features = {f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, *SIZE)) for camera in CAMERAS}
    features |= {STATE: PolicyFeature(FeatureType.STATE, (8,)), ACTION: PolicyFeature(FeatureType.ACTION, (7,))}
    fields = {"resize_imgs_with_padding": [edge, edge], "train_expert_only": True, "freeze_vision_encoder": True}
    policy = create_policy(folder / "vlm", features, default_statistics(8, 7), fields)
    policy.save(folder / "policy")
    return folder / "policy", sum(p.numel() for p in policy.parameters())


def _train(output: Path, root: Path, policy: Path, room: float, steps: int) -> dict[str, Any]:
    """Train with so much room for decoded frames; waiting and step time from its log."""
    from burnish.core.recipe import load_recipe
    from burnish.train.logging import read_rows
    from burnish.train.loop import loop
    from burnish.train.run import Run, start_files

    recipe = load_recipe(None, [
        "--name=bench", f"--output={output}", f"--data.root={root}", f"--policy.path={policy}",
        f"--data.cache_gb={room}", f"--train.batch_size={BATCH}", f"--train.steps={steps}", "--train.log_every=1",
        "--train.save_every=1000000", "--train.self_check=false", "--train.freeze=[vlm_with_expert\\.vlm]",
    ])  # fmt: skip
    begin = time.perf_counter()
    training = Run(recipe, progress=False)
    ready = time.perf_counter() - begin
    metrics = start_files(training, resumed=False)
    loop(training, metrics)
    rows = list(read_rows(metrics.path))
    seconds = np.array([row["step_seconds"] for row in rows])
    waits = np.array([row["data_wait_share"] for row in rows]) * seconds
    return {
        "after_first": float(waits[1:].sum() / seconds[1:].sum()), "whole": float(waits.sum() / seconds.sum()),
        "step_seconds": float(np.median(seconds)), "until_ready_seconds": ready, "steps": len(rows),
        "loss_first_last": [rows[0]["loss"], rows[-1]["loss"]],
    }  # fmt: skip


def replay_kept() -> dict[str, Any]:
    """Ratio of successes on the old task, 95 % interval over seeds and initial states, from the raw outcomes."""
    if not REPLAY.is_file():
        return {}
    rows = json.loads(REPLAY.read_text())["rows"]
    old = {row["label"]: row["outcomes"] for row in rows if row.get("eval") == "old"}
    with_, without = (
        np.array([[int(flag) for flag in old[name][seed]] for seed in sorted(old[name])], float)
        for name in ("replay", "plain")
    )
    rng, ratios = np.random.default_rng(0), []
    for _ in range(10_000):
        seeds, states = rng.integers(len(with_), size=len(with_)), rng.integers(with_.shape[1], size=with_.shape[1])
        picked = np.ix_(seeds, states)
        ratios.append(with_[picked].mean() / max(without[picked].mean(), 1e-9))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(with_.mean() / max(without.mean(), 1e-9)), "interval": [float(low), float(high)],
            "with": float(with_.mean()), "without": float(without.mean()), "seeds": len(with_)}  # fmt: skip
