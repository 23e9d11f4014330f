"""Scene questions with answers, made from simulator states, and the folder they are stored in.

docs/questions.md says what the folder holds. Kinds: where (pointing, in percent of the image), colour, left_of, count,
exists, holding, nearer, move (which object an instruction moves).
"""

import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import disk_errors, require_space, write_json, write_text
from burnish.core.outputs import new_output, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_lines, read_object, regular_file
from burnish.core.seeding import derive_seed
from burnish.core.workers import WorkerPool, count_workers
from burnish.data.frames import npy_header
from burnish.envs.base import Env, expand, make_env
from burnish.envs.tabletop_scene import COLOURS, SHAPES

KIND = "questions"
KINDS = ("where", "colour", "left_of", "count", "exists", "holding", "nearer", "move")
MOST_SIDE, MOST_IMAGES = 4096, 10**7
MOST_TEXT = 2000
"""Characters in a question, an answer or a kind."""
MIN_GAP = 0.09
"""Pairs closer than this share of the image (12 px of 128) are not asked about: the answer would be a guess."""


@dataclass(frozen=True)
class SceneFacts:
    """What a question may be asked about at one moment.

    Args:
        objects: name to {"colour", "shape"} where known (may be empty), for objects inside the image.
        image_points: name to (u, v) in [0, 1].
        hand_distance: name to metres from the gripper.
        instruction, source, held: the sentence, the object it moves, the object in the gripper.
    """

    objects: dict[str, dict[str, str]]
    image_points: dict[str, tuple[float, float]]
    hand_distance: dict[str, float]
    instruction: str
    source: str | None
    held: str | None


def scene_facts(env: Env, camera: str) -> SceneFacts:
    """Read the facts of the running episode through the environment's protocol."""
    truth = env.ground_truth()
    names = list(truth["objects"])
    positions = np.array([truth["objects"][n]["position"] for n in names])
    points = env.project(camera, positions)
    inside = [i for i in range(len(names)) if (points[i] > 0.01).all() and (points[i] < 0.99).all()]
    hand = np.array(truth.get("hand", positions.mean(0)))
    return SceneFacts(
        objects={
            names[i]: {k: truth["objects"][names[i]][k] for k in ("colour", "shape") if k in truth["objects"][names[i]]}
            for i in inside
        },
        image_points={names[i]: tuple(points[i]) for i in inside},
        hand_distance={names[i]: float(np.linalg.norm(positions[i] - hand)) for i in inside},
        instruction=env.instruction,
        source=truth.get("source"),
        held=truth.get("held"),
    )


def ask(facts: SceneFacts, rng: np.random.Generator, absent: list[tuple[str, str]] = ()) -> list[tuple[str, str, str]]:
    """All (kind, question, answer) of one moment, yes/no questions drawn so that both answers are equally likely.

    Args:
        absent: (colour, shape) pairs to draw from for objects that are not there.
    """
    out = []
    for name in facts.objects:
        u, v = facts.image_points[name]
        out.append(("where", f"where is the {name}?", f"x {int(100 * u)} y {int(100 * v)}"))
    out += _attribute_questions(facts, rng, absent)
    out += _pair_questions(facts, rng)
    out.append(("holding", "what is the gripper holding?", facts.held or "nothing"))
    if facts.source in facts.objects:
        out.append(("move", f"task: {facts.instruction}. which object must move?", facts.source))
    return out


def _attribute_questions(facts: SceneFacts, rng: np.random.Generator, absent) -> Iterator[tuple[str, str, str]]:
    shapes = [o["shape"] for o in facts.objects.values() if "shape" in o]
    for shape in sorted(set(shapes)):
        yield "count", f"how many {shape}s are there?", str(shapes.count(shape))
    for attributes in facts.objects.values():
        shape, colour = attributes.get("shape"), attributes.get("colour")
        if shapes.count(shape) == 1:
            yield "colour", f"what colour is the {shape}?", colour
        if colour:
            yield "colour", f"what shape is the {colour} object?", shape
    present = list(facts.objects)
    missing = [f"{c} {s}" for c, s in absent if f"{c} {s}" not in facts.objects]
    for _ in range(2 if missing and present else 0):
        here = rng.random() < 0.5
        yield "exists", f"is there a {rng.choice(present if here else missing)}?", "yes" if here else "no"


def _pair_questions(facts: SceneFacts, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    names = list(facts.objects)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for index in rng.permutation(len(pairs))[:4]:
        a, b = pairs[index] if rng.random() < 0.5 else pairs[index][::-1]
        gap = facts.image_points[a][0] - facts.image_points[b][0]
        if abs(gap) > MIN_GAP:
            yield "left_of", f"is the {a} left of the {b}?", "yes" if gap < 0 else "no"
        near = facts.hand_distance[a] - facts.hand_distance[b]
        if abs(near) > 0.04:
            yield "nearer", f"which is nearer to the gripper, the {a} or the {b}?", a if near < 0 else b


def draw_scenes(
    blocks: Iterable[tuple[int, int]], env_id: str, image_size: int, camera: str, seed: int, per_scene: int,
    kinds: Sequence[str], images: Path, first_byte: int,
) -> Generator[list[list[tuple[str, str, str]]], None, None]:  # fmt: skip
    """The worker of `make_questions`: draws scenes first to last - 1 of a block straight into the file `images`.

    Yields the questions about each scene of a block.
    """
    envs = [make_env(task, image_size) for task in expand(env_id)]
    absent = list(product(COLOURS, SHAPES)) if env_id.startswith("tabletop") else []
    for first, last in blocks:
        asked = []
        for scene in range(first, last):
            rng = np.random.default_rng(derive_seed("questions", env_id, seed, scene))
            env = envs[scene % len(envs)]
            env.reset((env.spec.num_initial_states or 0) + seed + scene)  # fixed ones are for evaluation
            expert = env.expert(scene)
            for _ in range(int(rng.integers(0, 15)) if rng.random() < 0.6 else 0):
                env.step(expert.act())
            picture = np.asarray(env.observe([camera]).images[camera], np.uint8).reshape(image_size, image_size, 3)
            _write_at(images, first_byte + scene * picture.nbytes, picture)
            questions = [one for one in ask(scene_facts(env, camera), rng, absent) if not kinds or one[0] in kinds]
            if per_scene:
                questions = [questions[i] for i in rng.permutation(len(questions))[:per_scene]]
            asked.append(questions)
        yield asked
    for env in envs:
        env.close()


def _write_at(path: Path, start: int, array: np.ndarray) -> None:
    """Positioned writes: on a full disk a memory map dies of SIGBUS, and these raise an error that can be reported."""
    view = memoryview(np.ascontiguousarray(array)).cast("B")
    with disk_errors(path), open(path, "r+b", buffering=0) as file:
        while view:
            done = os.pwrite(file.fileno(), view, start)
            view, start = view[done:], start + done


def make_questions(
    env: str, scenes: int, root: Path | str, *, image_size: int = 96, camera: str = "", per_scene: int = 0,
    kinds: Sequence[str] = (), seed: int = 0, workers: int = 0, progress: bool = True,
) -> Path:  # fmt: skip
    """Make images of scenes with their questions and answers under `root`, and return it.

    Args:
        env: environment id; several tasks take turns.
        scenes: how many images.
        root: folder to make; one that holds just what is asked for is left as it is. `<root>.partial` beside it is
            filled until then.
        image_size: height and width of the images in pixels.
        camera: the view; empty means the environment's first one.
        per_scene: how many questions to keep for each image; 0 keeps all.
        kinds: ask only these, see `KINDS`; none named: all.
        seed: first initial state, counted from behind fixed ones. Keep training and held-out ranges apart.
        workers: simulator processes; 0 means one for each core.
        progress: show a bar on stderr.

    Raises:
        BurnishError: bad arguments, `root` holds something else than what is asked for, another process is making it,
            or the disk is full; then nothing is left.
    """
    _check_numbers(scenes, image_size, per_scene, seed)
    if unknown := set(kinds) - {*KINDS}:
        raise BurnishError(f"questions of kind '{sorted(unknown)[0]}'", f"some of {', '.join(KINDS)}")
    root = Path(root)
    require_own(root, KIND, _is_made)
    root = root.resolve() if root.is_symlink() else root
    probe = make_env(expand(env)[0], image_size)
    camera = camera or probe.spec.cameras[0]
    views = probe.spec.cameras
    probe.close()
    if camera not in views:
        raise BurnishError(f"unknown camera '{camera}' of {env}", f"one of {', '.join(views)}")
    sizes = {"scenes": scenes, "image_size": image_size, "camera": camera, "per_scene": per_scene}
    meta = {"env": env, **sizes, **({"kinds": sorted(kinds)} if kinds else {}), "seed": seed, "format": 1}
    if holds_questions(root, meta):
        return root
    with new_output(root, KIND) as partial:
        _fill(partial, meta, seed, workers, progress)
    return root


def _check_numbers(scenes: int, image_size: int, per_scene: int, seed: int) -> None:
    limits = {"scenes": (scenes, 1, 10**8), "image size": (image_size, 8, 4096), "per_scene": (per_scene, 0, 1000),
              "seed": (seed, 0, 2**31)}  # fmt: skip
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise BurnishError(f"{name} is {value}", f"{least} to {most}")


def holds_questions(root: Path, meta: dict) -> bool:
    """Whether `root` holds what is asked for; BurnishError where it holds other questions, or something else."""
    require_own(root, KIND, _is_made)
    if not _is_made(root):
        return False
    found = read_object(root / "meta.json")
    if found != meta:
        raise BurnishError(f"{root} holds other questions ({str(found)[:300]})", f"{meta}", "another --root")
    return True


def _is_made(root: Path) -> bool:
    return (root / "meta.json").exists()


def _fill(folder: Path, meta: dict, seed: int, workers: int, progress: bool) -> None:
    """Write images, questions and meta.json into a folder that was claimed."""
    for name in ("images.npy", "questions.jsonl", "meta.json"):
        (folder / name).unlink(missing_ok=True)
    scenes, size, images = meta["scenes"], meta["image_size"], folder / "images.npy"
    header = npy_header((scenes, size, size, 3), np.uint8)
    require_space(folder, len(header) + scenes * size * size * 3, f"{scenes} images in {folder}")
    images.write_bytes(header)
    arguments = meta["env"], size, meta["camera"], seed, meta["per_scene"], meta.get("kinds", ()), images, len(header)
    asked = _ask_about_all(scenes, arguments, workers, progress)
    entries = (
        {"image": image, "question": question, "answer": answer, "kind": kind}
        for image in range(scenes)
        for kind, question, answer in asked[image]
    )
    write_text(folder / "questions.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    write_json(folder / "meta.json", meta)


def _ask_about_all(scenes: int, arguments: tuple, workers: int, progress: bool) -> dict[int, list]:
    """The questions about each scene; `arguments` are those of `draw_scenes`."""
    size = max(1, min(200, scenes // 8))
    blocks = [(first, min(first + size, scenes)) for first in range(0, scenes, size)]
    count, name = min(count_workers(workers), len(blocks)), "simulator process"
    asked: dict[int, list] = {}
    with (
        WorkerPool(draw_scenes, *arguments, count=count, name=name, fix="fewer workers if memory ran out") as pool,
        progress_bar(total=scenes, desc="questions", unit="scene", shown=progress) as bar,
    ):
        for (first, last), found in pool.run(blocks, label=lambda block: f"scenes {block[0]} to {block[1] - 1}"):
            asked |= zip(range(first, last), found, strict=True)
            bar.update(last - first)
    return asked


@dataclass(frozen=True)
class Questions:
    """An opened question folder, see docs/questions.md.

    Attributes:
        images: uint8 [N, H, W, 3], memory-mapped.
        entries: one for each question: "image" (its index), "question", "answer", "kind".
        camera: name of the view.
    """

    images: np.ndarray
    entries: list[dict]
    camera: str


def open_questions(root: Path | str) -> Questions:
    """Open the question folder `root`.

    Raises:
        BurnishError: a file is missing, cannot be read, is empty, or points outside the images.
    """
    root = Path(root)
    for name in ("meta.json", "images.npy", "questions.jsonl"):
        if not (root / name).exists():
            make = f"burnish data questions tabletop 1000 {root}"
            raise BurnishError(f"{root} has no {name}", "a question folder", make)
    camera = read_object(root / "meta.json", root).get("camera")
    if not isinstance(camera, str) or not camera:
        raise BurnishError(f"{root}/meta.json names no camera", "the name of a camera")
    images = _open_images(regular_file(root / "images.npy", root))
    entries = [_entry(row, len(images), f"{root}/questions.jsonl:{line}")
               for line, row in read_lines(root / "questions.jsonl", root)]  # fmt: skip
    if not entries:
        raise BurnishError(f"{root}/questions.jsonl is empty", "at least one question")
    return Questions(images, entries, camera)


def _open_images(path: Path) -> np.ndarray:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, OverflowError, TypeError) as error:
        raise BurnishError(f"{path} cannot be read ({one_line(error, 200)})", "images as numpy writes them") from None
    shape = getattr(images, "shape", ())  # numpy also opens archives
    right = len(shape) == 4 and shape[3] == 3 and 0 not in shape and images.dtype == np.uint8
    if not right or max(shape[1:]) > MOST_SIDE or shape[0] > MOST_IMAGES:
        raise BurnishError(f"{path} holds {shape} of {getattr(images, 'dtype', type(images).__name__)}",
                           f"uint8 [images, height, width, 3] of at most {MOST_SIDE} pixels")  # fmt: skip
    return images


def _entry(row: dict, images: int, where: str) -> dict:
    """A line of questions.jsonl, checked; a question without a kind is of the kind "other"."""
    row.setdefault("kind", "other")
    for key in ("question", "answer", "kind"):
        if not isinstance(row.get(key), str) or not len(row[key]) <= MOST_TEXT:
            raise BurnishError(f"{where} has {key} {str(row.get(key))[:100]!r}", f"a text of up to {MOST_TEXT} letters")
    if type(row.get("image")) is not int or not 0 <= row["image"] < images:
        raise BurnishError(f"{where} is about image {str(row.get('image'))[:100]}, beyond the {images} in images.npy",
                           f"a number from 0 to {images - 1}")  # fmt: skip
    return row
