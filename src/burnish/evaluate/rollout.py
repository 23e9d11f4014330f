"""Closed-loop evaluation: a batched policy over parallel simulator processes, on fixed initial states.

An episode is decided by (policy, task, initial state, seed): the noise of every replan is derived from these alone,
and every policy call has the same number of rows, so batch neighbours, the number of workers and the order in which
episodes end do not enter. Between different batch sizes last bits may differ; `batch_size` is therefore recorded.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.core.cluster import choose_engine
from burnish.core.config import CacheConfig, DelayConfig, EvalConfig
from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.options import check
from burnish.core.outputs import require_own
from burnish.core.progress import progress_bar
from burnish.core.provenance import commit
from burnish.core.seeding import derive_seed
from burnish.core.workers import Engine
from burnish.data.watchdog import Watchdog
from burnish.envs.base import EnvSpec, Size, check_size, expand, make_env
from burnish.evaluate.batching import BatchedPolicy, match_cameras, view_sizes
from burnish.evaluate.delay import Ahead, DelayedMeasurement, DelayedPolicy, measured_steps
from burnish.evaluate.evaluation import Evaluation, video_path
from burnish.evaluate.records import EVALUATION, SUMMARY, Journal, is_evaluation
from burnish.evaluate.scheduler import Measurement, Planned
from burnish.evaluate.simulators import Episode, MakeEnv, SimulatorPool
from burnish.methods.retrieve.ask import watch
from burnish.policies.base import Policy
from burnish.policies.load import policy_and_hash
from burnish.runtime.caches import Reuse, keeping
from burnish.runtime.choose import find_sampler, using_sampler
from burnish.runtime.executor import Runtime
from burnish.sampling.kept import Kept

VIDEOS_PER_TASK = 2
EPISODES_PER_WORKER = 4
log = logging.getLogger("burnish")

Trial = tuple[EnvSpec, int]
Prepare = Callable[[EnvSpec], BatchedPolicy | None]


def evaluate(
    policy: Policy | Path | str, env: str, *, episodes: int = 100, output: Path | str, first_state: int = 1_000_000,
    seed: int = 0, workers: int = 0, batch_size: int = 0, max_steps: int = 0, image_size: int | None = None,
    cameras: Sequence[str] | None = None, n_action_steps: int | None = None, device: str = "",
    instruction_swap: bool = False, video: bool = True, engine: str = "processes", num_gpus: float | None = None,
    progress: bool = True, make: MakeEnv = make_env, delay: DelayConfig | None = None, sampler: str = "",
    tier: str = "", cache: CacheConfig | None = None, watchdog: Path | str = "",
) -> Evaluation:  # fmt: skip
    """Measure a policy in closed loop and write `episodes.jsonl`, `summary.json` and videos into `output`.

    Called again with the same arguments it continues after the episodes that are there. In a script, call it
    under `if __name__ == "__main__":`, because simulator processes import the script again.

    With `instruction_swap` the policy is told to do the task with another object. `success` keeps its meaning (the
    original object), `other` says how often the newly named object's task was solved; the first of the two ends
    the episode. A policy that listens drops on the first and succeeds on the second.

    Args:
        policy: a policy, its LeRobot folder, or the name of a shipped base.
        env: environment id, see `burnish.envs.base`.
        episodes: for each task; at most the number of its fixed initial states.
        output: folder of this evaluation.
        first_state: first initial state where the environment has unlimited ones, otherwise 0 is the first.
        seed: of the policy's noise.
        workers: simulator processes; 0 means one for each core.
        batch_size: episodes in flight, 0 means four for each worker; the policy is called on half of them.
        max_steps: limit in control steps; 0 means the environment's own.
        image_size: side of square images in pixels; None means the height and width that the policy was trained on.
        cameras: the environment's cameras in the policy's order; None means those of the same names.
        n_action_steps: actions executed of each chunk; None means the policy's own number.
        device: torch device that a policy folder is loaded to; "" means a GPU where there is one.
        instruction_swap: name another object, where the environment offers it.
        video: film the first two initial states of every task.
        engine: where simulators run, "processes" or "ray", see `core.cluster.choose_engine`; outcomes are equal.
        num_gpus: GPUs for each simulator on Ray.
        progress: show a bar on stderr.
        make: builds a simulator from a single-task id and an image size; importable by name.
        delay: let the policy answer late; None means that simulators wait for it.
        sampler: of a flow-matching policy, see `runtime.choose.find_sampler`; "" means the policy's own.
        tier: run the policy by the executor, see `runtime.executor.TIERS`; "" means as LeRobot does.
        cache: what the policy need not compute again; None means that it computes all.
        watchdog: index of the data set that the policy was trained on; the records then say how far from it it was.

    Raises:
        BurnishError: bad arguments, a folder that holds another evaluation, a simulator process that died.
    """
    trials = EvalConfig(env=env, episodes=episodes, first_state=first_state, seed=seed, workers=workers,
                        batch_size=batch_size, max_steps=max_steps, cameras=list(cameras or ()),
                        delay=delay or DelayConfig(), sampler=find_sampler(sampler, policy), tier=tier,
                        cache=cache or CacheConfig(), watchdog=str(watchdog))  # fmt: skip
    check_trials(trials, Path(output), image_size)
    place = choose_engine(engine, num_gpus)
    policy, weights = policy_and_hash(policy, device)
    check_size(env, size := image_size or view_sizes(policy, cameras))
    job = _Job(trials, size, video, progress, make, swap=instruction_swap, engine=place)
    job.watchdog = watch(Path(trials.watchdog), policy, weights) if trials.watchdog else None
    with using_sampler(policy, trials.sampler), _keeping(policy, job):
        return job.run(Path(output), weights, lambda spec: _batched(job, policy, spec, cameras, n_action_steps))


def _keeping(policy: Policy, job: "_Job") -> AbstractContextManager[None]:
    """Inside, what was computed from the same pictures is found again, where that is asked for."""
    kept = Kept() if job.trials.cache.mode == "exact" else None
    job.kept = kept if policy.supports("runtime") else None
    return nullcontext() if kept is None or job.kept else keeping(policy, kept)


def _batched(
    job: "_Job", policy: Policy, spec: EnvSpec, cameras: Sequence[str] | None, n_action_steps: int | None
) -> BatchedPolicy:
    if policy.action_dim != len(spec.action_names):
        expected = f"{len(spec.action_names)} for {spec.task_id}"
        raise BurnishError(f"a policy with {policy.action_dim} action dimensions", expected)
    steps, delay = policy.n_action_steps if n_action_steps is None else n_action_steps, job.trials.delay
    if delay.measured:
        delay = job.trials.delay = replace(delay, steps=measured_steps(delay.measured, spec.fps), measured="")
    given = policy, match_cameras(policy, spec, cameras), job.trials.seed, (job.batch_size + 1) // 2, steps
    asked = BatchedPolicy(*given) if delay.plain else DelayedPolicy(*given, delay=delay, spec=spec)
    if job.trials.cache.mode in ("images", "prefix"):
        asked.reuse = Reuse(job.trials.cache, policy, job.batch_size)
    if job.trials.tier or job.kept:
        asked.runner = Runtime(policy, tier=job.trials.tier or "exact", kept=job.kept)
    asked.watchdog = job.watchdog
    return asked


def evaluate_expert(
    env: str, *, episodes: int = 100, output: Path | str, which: str = "expert", first_state: int = 1_000_000,
    seed: int = 0, workers: int = 0, max_steps: int = 0, image_size: int = 128, video: bool = False,
    engine: str = "processes", num_gpus: float | None = None, progress: bool = True, make: MakeEnv = make_env,
) -> Evaluation:  # fmt: skip
    """Measure a scripted expert on the same initial states, with the same files as `evaluate`.

    Tasks that have no such expert are left out and told; summary.json names them.

    Args:
        which: "expert", or "random_object" for the one that picks its object at random: what a policy that ignores
            language can reach at best.

    The other arguments are those of `evaluate`.

    Raises:
        BurnishError: no such expert, and what `evaluate` refuses.
    """
    if which not in ("expert", "random_object"):
        raise BurnishError(f"unknown expert '{which}'", "expert or random_object")
    trials = EvalConfig(env=env, episodes=episodes, first_state=first_state, seed=seed, workers=workers,
                        max_steps=max_steps)  # fmt: skip
    check_trials(trials, Path(output), image_size)
    job = _Job(trials, image_size, video, progress, make, actor=which, engine=choose_engine(engine, num_gpus))
    return job.run(Path(output), which, lambda spec: None)


def check_trials(trials: EvalConfig, output: Path, image_size: int | None) -> None:
    """Raise BurnishError for settings that cannot be measured, before anything slow begins."""
    check(trials, "evaluation")
    if image_size is not None:
        check_size(trials.env, image_size)
    expand(trials.env)
    require_own(output, EVALUATION, is_evaluation)


def initial_states(spec: EnvSpec, first: int, count: int) -> range:
    """`count` initial states of a task from `first`; where it has a fixed number, as many of them as there are."""
    if spec.num_initial_states is None:
        return range(first, first + count)
    return range(min(count, spec.num_initial_states))


@dataclass
class _Job:
    """What `evaluate` and `evaluate_expert` share; see there."""

    trials: EvalConfig
    image_size: Size
    video: bool
    progress: bool
    make: MakeEnv
    swap: bool = False
    actor: str = "policy"
    engine: Engine = field(default_factory=Engine)
    kept: Kept | None = None
    watchdog: Watchdog | None = None

    @property
    def batch_size(self) -> int:
        return self.trials.batch_size or EPISODES_PER_WORKER * self.engine.count(self.trials.workers)

    def run(self, output: Path, weights: str, prepare: Prepare) -> Evaluation:
        """`prepare` returns the batched policy (None for an expert) once a simulator has said what it offers."""
        start = time.perf_counter()
        with self.engine:
            workers = min(self.engine.count(self.trials.workers), self.batch_size)
            with SimulatorPool(workers, self.make, self.image_size, self.engine) as pool:
                return self._measure(pool, output, weights, prepare, start)

    def _measure(self, pool: SimulatorPool, output: Path, weights: str, prepare: Prepare, start: float) -> Evaluation:
        specs = pool.describe(expand(self.trials.env), self.actor, self.trials.first_state)
        able = [spec for spec in specs if spec.task_id not in pool.unable]
        if not able:
            raise BurnishError(next(iter(pool.unable.values())), "a task with such an expert")
        for reason in pool.unable.values():
            log.warning("left out: %s", reason)
        policy = prepare(able[0])
        cameras = tuple(policy.cameras.values()) if policy else ()
        plan = self.plan(able)
        settings = self.settings(weights, cameras, policy.n_action_steps if policy else 0)
        with Journal(output, settings) as journal:
            before = len(journal.records)
            history = policy.policy.window.reach if policy else 0
            todo = self.missing(plan, journal, cameras, output, history)
            if todo:
                (output / SUMMARY).unlink(missing_ok=True)  # of fewer episodes: this one has not ended
            self.fill(pool, policy, journal, todo, len(plan))
            records = {r.key: r for r in journal.records}
            found = [records[spec.task_id, state] for spec, state in plan]
            seconds = time.perf_counter() - start
            reused = dict(policy.reuse.counts) if policy and policy.reuse else {}
            dog = self.watchdog
            taken = 1000 * dog.seconds / dog.asked if dog and dog.asked else 0.0
            evaluation = Evaluation(output, settings, found, seconds, len(records) - before, pool.unable, reused, taken)
            write_json(output / SUMMARY, evaluation.to_dict())
        return evaluation

    def plan(self, specs: Sequence[EnvSpec]) -> list[Trial]:
        """Every episode, task by task. The same initial state twice would be the same trial twice."""
        first, count = self.trials.first_state, self.trials.episodes
        return [(spec, state) for spec in specs for state in initial_states(spec, first, count)]

    def settings(self, weights: str, cameras: Sequence[str], n_action_steps: int) -> dict[str, Any]:
        trials = self.trials
        return {
            "env": trials.env, "actor": self.actor, "weights": weights,
            "variant": "instruction_swap" if self.swap else "plain", "seed": trials.seed,
            "first_state": trials.first_state, "max_steps": trials.max_steps, "image_size": self.image_size,
            "cameras": list(cameras), "n_action_steps": n_action_steps,
            "batch_size": self.batch_size if self.actor == "policy" else 0,
            **({} if trials.delay.plain else {"delay": asdict(trials.delay)}),
            **({"cache": asdict(trials.cache)} if trials.cache.mode in ("images", "prefix") else {}),
            **({"sampler": trials.sampler} if trials.sampler else {}),
            **({"watchdog": self.watchdog.about} if self.watchdog else {}),
            **({"tier": trials.tier} if trials.tier not in ("", "exact") else {}),  # exact ones say the same
        }  # fmt: skip

    def missing(
        self, plan: list[Trial], journal: Journal, cameras: tuple[str, ...], output: Path, history: int = 0
    ) -> list[Episode]:
        done = {r.key for r in journal.records}
        filmed: dict[str, int] = {}
        episodes = []
        for spec, state in plan:
            filmed[spec.task_id] = filmed.get(spec.task_id, 0) + 1
            video = self.video and filmed[spec.task_id] <= VIDEOS_PER_TASK
            if (spec.task_id, state) not in done:
                episodes.append(Episode(
                    task=spec.task_id, initial_state=state, max_steps=self.trials.max_steps or spec.max_steps,
                    cameras=cameras or (spec.cameras[:1] if video else ()), actor=self.actor,
                    actor_seed=derive_seed(self.actor, self.trials.seed, spec.task_id, state) % 2**31, swap=self.swap,
                    video=output / video_path(spec.task_id, state) if video else None, history=history,
                ))  # fmt: skip
        return episodes

    def fill(
        self, pool: SimulatorPool, policy: BatchedPolicy | None, journal: Journal, todo: list[Episode], total: int
    ) -> None:
        stamp = {name: journal.settings[name] for name in ("seed", "weights", "variant")} | {"commit": commit()}
        shown = {"desc": self.trials.env, "unit": "ep", "shown": self.progress}
        with progress_bar(total=total, initial=total - len(todo), **shown) as bar:
            given = pool, policy, self.batch_size, journal, stamp
            if self.trials.delay.plain:
                Measurement(*given).run(map(Planned, todo), bar)
            else:
                DelayedMeasurement(*given).run(map(Ahead, todo), bar)
