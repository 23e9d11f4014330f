"""Scenes for training the scene3d teacher: images of two tabletop cameras and the points behind their pixels."""

from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np

from burnish.core.files import new_folder, require_space, write_json
from burnish.core.seeding import derive_seed
from burnish.core.workers import WorkerPool, count_workers
from burnish.envs.base import make_env
from burnish.teachers.scene3d import CAMERAS

ENVS = ("tabletop:lift", "tabletop:put_on", "tabletop:lift+light+texture")
SHARE = 256
"""Scenes that a process makes before it answers."""


def make_scenes(folder: Path, count: int, image_size: int, points: int, seed: int, progress: bool = True) -> Path:
    """Draw scenes with hands anywhere, now and then an object in the air, and for every third another light and table.

    Args:
        folder: gets images.npy uint8 [N, V, H, W, 3], points.npy float16 [N, V, points, points, 3] (world, in
            metres); left as it is where it has what is asked for.
        count: scenes N.
        image_size: H = W in pixels.
        points: points along each side.
        seed: first scene.
    """
    import json

    from tqdm import tqdm

    request = {"count": count, "image_size": image_size, "points": points, "seed": seed, "version": 3}
    facts = folder / "scenes.json"
    if facts.is_file() and json.loads(facts.read_text()) == request:
        return folder
    shape = (count, len(CAMERAS))
    require_space(folder.parent, count * len(CAMERAS) * (image_size**2 * 3 + points**2 * 6), str(folder))
    shares = [(first, min(first + SHARE, count)) for first in range(0, count, SHARE)]
    name = "simulator process"
    with (
        new_folder(folder) as new,
        WorkerPool(draw_scenes, seed, image_size, points, count=min(count_workers(), len(shares)), name=name) as pool,
        tqdm(total=count, desc="scenes", unit="scene", disable=not progress) as bar,
    ):
        images = np.lib.format.open_memmap(new / "images.npy", "w+", np.uint8, (*shape, image_size, image_size, 3))
        maps = np.lib.format.open_memmap(new / "points.npy", "w+", np.float16, (*shape, points, points, 3))
        for (first, last), (seen, where) in pool.run(shares, label=lambda share: f"scenes from {share[0]} on"):
            images[first:last], maps[first:last] = seen, where
            bar.update(last - first)
        for array in (images, maps):
            array.flush()
        write_json(new / "scenes.json", request)
    return folder


def draw_scenes(
    shares: Iterable[tuple[int, int]], seed: int, image_size: int, points: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """The worker of `make_scenes`: images and points of scenes first to last - 1 of each share."""
    envs = [make_env(name, image_size) for name in ENVS]
    for first, last in shares:
        images = np.zeros((last - first, len(CAMERAS), image_size, image_size, 3), np.uint8)
        maps = np.zeros((last - first, len(CAMERAS), points, points, 3), np.float16)
        for i, scene in enumerate(range(seed + first, seed + last)):
            rng = np.random.default_rng(derive_seed("scene3d", scene))
            env = envs[int(rng.integers(len(envs)))]
            env.reset(scene)
            facts, state = _disturbed(env, rng)
            env.restore(facts, state)
            seen = env.observe(CAMERAS).images
            for v, camera in enumerate(CAMERAS):
                images[i, v] = seen[camera]
                world = env.geometry(camera)["points"]
                cells = image_size // points
                maps[i, v] = world[cells // 2 :: cells, cells // 2 :: cells][:points, :points]
        yield images, maps
    for env in envs:
        env.close()


def _disturbed(env, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Facts and state of the scene with the hand anywhere, and for every third scene an object between the fingers."""
    facts, state = env.ground_truth(), env.observe().state.copy()
    facts["hand"] = [*rng.uniform(-0.22, 0.22, 2), rng.uniform(0.02, 0.26)]
    state[3] = rng.uniform(0.0, 0.1)
    movable = [o for o in facts["objects"].values() if o["shape"] != "plate"]
    if rng.random() < 1 / 3:
        movable[int(rng.integers(len(movable)))]["position"] = facts["hand"]
        state[3] = 0.053
    del facts["cameras"]  # the standing ones are where they were; the wrist's hangs on the hand, which has moved
    return facts, state
