"""Preference pairs: rollouts of a policy from the same initial states, and which of two chunks led to success.

The first rollout of an initial state is free. Every other one, a branch, repeats its actions up to a branch point, one
of its replans, and goes on from there with other noise. So two rollouts have a shared prefix, the whole past of the
chunk in which they diverge, and a pair compares exactly these two chunks on exactly the same observation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import new_folder, write_json
from burnish.core.options import number
from burnish.core.outputs import mark, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object
from burnish.core.seeding import derive_seed
from burnish.core.workers import count_workers
from burnish.data.assemble import assemble
from burnish.data.pairs import FACTS, Pair, make_pairs, write_index
from burnish.data.spool import Spool, StoredRecording, check_same_request
from burnish.envs.base import EnvSpec, Observation, check_size, expand, make_env
from burnish.evaluate.batching import BatchedPolicy, Request, match_cameras, view_sizes
from burnish.evaluate.scheduler import Scheduler
from burnish.evaluate.simulators import Episode, MakeEnv, SimulatorPool, Waiting
from burnish.policies.base import Policy
from burnish.policies.load import policy_and_hash

KIND = "preference pairs"


@dataclass
class _Rollout:
    """One rollout on its way: `prefix` [F, A] are the actions of the first rollout that it repeats."""

    spec: EnvSpec
    state: int
    place: int
    prefix: np.ndarray
    expert: bool = False
    replans: int = 0

    @property
    def label(self) -> str:
        return f"{self.spec.task_id} rollout {self.place}"


@dataclass(frozen=True)
class Collection:
    """What `collect` made."""

    root: Path
    pairs: int
    episodes: int
    successes: int
    mixed_states: int
    states: int

    def __str__(self) -> str:
        rollouts = f"{self.episodes} rollouts ({self.successes} solved)"
        mixed = f"{self.mixed_states} of {self.states} initial states have both outcomes"
        return f"{self.pairs} pairs from {rollouts} in {self.root}; {mixed}"


def collect(
    policy: Policy | Path | str, env: str, root: Path | str, *, states: int = 100, rollouts: int = 4,
    first_state: int = 500_000, seed: int = 0, image_size: int = 0, action_noise: float = 0.0, expert: bool = False,
    ties: str = "skip", offsets: Sequence[int] = (0,), limit: int = 0, workers: int = 0, device: str = "",
    progress: bool = True, make: MakeEnv = make_env,
) -> Collection:  # fmt: skip
    """Let a policy act several times from each initial state and write its pairs as a LeRobot data set with an index.

    Args:
        policy: a policy or its folder.
        env: environment id.
        root: folder to make; `<root>.partial` beside it holds finished rollouts until then.
        states: initial states for each task.
        rollouts: for each of them, the first one included.
        first_state: the first initial state, counted from behind fixed ones; otherwise evaluation begins at 1000000.
        seed: of the policy's noise and of the branch points.
        image_size: side of the recorded views in pixels; 0 means the policy's own.
        action_noise: standard deviation of the noise added to a branch's first chunk, as a share of half the range.
        expert: where all rollouts of a state failed, let the environment's expert complete one more.
        ties, offsets, limit: see `make_pairs`.
        workers: simulator processes; 0 means one for each core.
        device: torch device of a policy folder; "" means a GPU where there is one.
        progress: show a bar on stderr.
        make: builds a simulator from a single-task id and an image size; importable by name.

    Raises:
        BurnishError: bad arguments, a folder made with other settings, no state with both outcomes. A folder that is
            complete is left as it is.
    """
    root = Path(root)
    _check_numbers(states, rollouts, workers=workers, limit=limit, image_size=image_size, action_noise=action_noise,
                   first_state=first_state)  # fmt: skip
    require_own(root, KIND, lambda folder: True)  # what lies in it is looked at below
    policy, weights = policy_and_hash(policy, device)
    if not offsets or not all(0 <= offset < policy.act_steps for offset in offsets):
        raise BurnishError(f"offsets {list(offsets)}", f"frames from 0 to {policy.act_steps - 1}: a chunk must reach "
                           "the branch point")  # fmt: skip
    request = {
        "format": 1, "env": env, "policy": weights, "states": states, "rollouts": rollouts,
        "first_state": first_state, "seed": seed, "image_size": image_size or view_sizes(policy, None),
        "action_noise": action_noise, "expert": expert,
    }  # fmt: skip
    check_size(env, request["image_size"])
    options = {"ties": ties, "offsets": list(offsets), "limit": limit}
    if root.exists():
        return _already_made(root, request | options)
    spool = Spool(root, request)
    try:
        if root.exists():  # another process has finished it meanwhile
            return _already_made(root, request | options)
        count = count_workers(workers)
        with SimulatorPool(count, make, request["image_size"]) as pool:
            specs = pool.describe(expand(env))
            for spec in specs:
                _collect_task(pool, policy, spec, spool, request, 4 * count, progress)
        collection = _finish(root, spool, specs, request, options)
        spool.remove()
    finally:
        spool.close()
    return collection


def _check_numbers(states: int, rollouts: int, **others: float) -> None:
    if states < 1 or rollouts < 2:
        raise BurnishError(f"{states} states with {rollouts} rollouts", "at least 1 state and 2 rollouts")
    if states > 10**6 or rollouts > 1000:
        raise BurnishError(f"{states} states with {rollouts} rollouts", "at most 1000000 states and 1000 rollouts")
    most = {"image_size": 4096, "first_state": 2**31, "action_noise": 10}
    for name, value in others.items():
        if not number(value) or value < 0 or value > most.get(name, value):
            above = f" and at most {most[name]}" if name in most else ""
            raise BurnishError(f"{name} is {value}", f"a number of at least 0{above}")


def _collect_task(
    pool: SimulatorPool, policy: Policy, spec: EnvSpec, spool: Spool, request: dict[str, Any], slots: int, bar: bool
) -> None:
    """All rollouts of one task: the first of each initial state, then the branches."""
    folder, rollouts, seed = spool.task_folder(spec.task_id), request["rollouts"], request["seed"]
    cameras = match_cameras(policy, spec, None)
    write_json(folder / "spec.json", {
        "fps": spec.fps, "state_names": list(spec.state_names), "action_names": list(spec.action_names),
        "cameras": [cameras[name] for name in policy.cameras], "max_steps": spec.max_steps,
    })  # fmt: skip
    first = request["first_state"] + (spec.num_initial_states or 0)  # fixed ones are for evaluation
    states = range(first, first + request["states"])
    steps = policy.n_action_steps
    actor = BatchedPolicy(policy, cameras, seed, (slots + 1) // 2, steps)
    driver = _Driver(pool, actor, slots, folder, request, states, bar)
    empty = np.zeros((0, len(spec.action_names)), np.float32)
    done = spool.attempts(spec.task_id)
    if done and StoredRecording(done[n := min(done)]).facts["initial_state"] != first + n // (rollouts + 1):
        raise BurnishError(f"{spool.folder} holds rollouts of other initial states, made by an earlier version",
                           f"those from {first} on", f"rm -r '{spool.folder}'")  # fmt: skip
    driver.drive([_Rollout(spec, s, 0, empty) for i, s in enumerate(states) if i * (rollouts + 1) not in done])
    done = spool.attempts(spec.task_id)
    branches = []
    for i, state in enumerate(states):
        missing = [place for place in range(1, rollouts) if i * (rollouts + 1) + place not in done]
        if missing:
            first_one = StoredRecording(done[i * (rollouts + 1)])["action"]
            prefixes = {place: _shared_prefix(seed, state, place, first_one, steps) for place in missing}
            branches += [_Rollout(spec, state, place, prefix) for place, prefix in prefixes.items()]
    driver.drive(branches)
    if request["expert"]:
        driver.drive(_completions(spool, spec, states, rollouts, request, policy))


def _shared_prefix(seed: int, state: int, place: int, actions: np.ndarray, steps: int) -> np.ndarray:
    """What a branch repeats of the first rollout's actions: up to one of its replans, each equally likely."""
    replans = -(-len(actions) // steps)
    return actions[: derive_seed("part", seed, state, place) % replans * steps]


def _completions(spool: Spool, spec: EnvSpec, states, rollouts: int, request, policy: Policy) -> list[_Rollout]:
    done, found = spool.attempts(spec.task_id), []
    for i, state in enumerate(states):
        number = i * (rollouts + 1)
        if number + rollouts in done or any(".solved." in done[number + p].name for p in range(rollouts)):
            continue
        first_one = StoredRecording(done[number])["action"]
        prefix = _shared_prefix(request["seed"], state, rollouts, first_one, policy.n_action_steps)
        found.append(_Rollout(spec, state, rollouts, prefix, expert=True))
    return found


class _Driver(Scheduler[_Rollout]):
    """Repeats the prefix of a rollout before the policy, or the expert, goes on."""

    def __init__(
        self, pool: SimulatorPool, actor: BatchedPolicy, slots: int, folder: Path, request: dict[str, Any],
        states: Sequence[int], progress: bool,
    ):  # fmt: skip
        super().__init__(pool, actor, slots)
        self.actor, self.folder, self.options, self.states, self.progress = actor, folder, request, states, progress

    def drive(self, rollouts: list[_Rollout]) -> None:
        with progress_bar(total=len(rollouts), desc="rollouts", unit="ep", shown=self.progress) as bar:
            self.run(rollouts, bar)

    def episode(self, run: _Rollout) -> Episode:
        number = self.states.index(run.state) * (self.options["rollouts"] + 1) + run.place
        return Episode(
            task=run.spec.task_id, initial_state=run.state, max_steps=run.spec.max_steps,
            cameras=tuple(self.actor.cameras.values()), record=self.folder / f"{number:06d}.safetensors",
            actor_seed=derive_seed("completion", run.state) % 2**31, history=self.actor.policy.window.reach,
        )  # fmt: skip

    def received(self, reply: Waiting) -> None:
        run = self.running[reply.slot]
        if not run.replans and len(run.prefix):
            run.replans = len(run.prefix) // self.actor.n_action_steps
            self.pool.act(reply.slot, run.prefix)
        elif run.expert:
            self.pool.finish(reply.slot)
        else:
            super().received(reply)

    def request(self, run: _Rollout, observation: Observation) -> Request:
        return Request(observation, run.label, run.state, run.replans)

    def planned(self, run: _Rollout, chunk: np.ndarray, milliseconds: float) -> np.ndarray:
        disturbed = self.options["action_noise"] and run.place and run.replans * len(chunk) == len(run.prefix)
        run.replans += 1
        return self._disturb(run, chunk) if disturbed else chunk

    def _disturb(self, run: _Rollout, chunk: np.ndarray) -> np.ndarray:
        low, high = run.spec.action_low, run.spec.action_high
        random = np.random.default_rng(derive_seed("noise", self.options["seed"], run.label, run.state))
        noise = random.normal(size=chunk.shape) * self.options["action_noise"] * (high - low) / 2
        return np.clip(chunk + noise, low, high).astype(np.float32)


def _already_made(root: Path, wanted: dict[str, Any]) -> Collection:
    """The collection that `root` holds, if it is the one that is asked for."""
    if not (root / FACTS).is_file():
        raise BurnishError(f"{root} exists and holds no pairs", "a new folder", "another --root")
    facts = read_object(root / FACTS)
    facts["offsets"] = facts.pop("leads", facts.get("offsets"))  # its name in folders of 0.1
    check_same_request(facts, wanted, root)
    try:
        outcomes, size = facts["outcomes"], facts["group_sizes"]
        ends = np.cumsum(size)
        solved = [sum(outcomes[end - n : end]) for end, n in zip(ends, size, strict=True)]
        mixed = sum(0 < k < n for k, n in zip(solved, size, strict=True))
        return Collection(root, int(facts["pairs"]), len(outcomes), sum(outcomes), mixed, len(size))
    except (KeyError, TypeError, ValueError) as error:
        raise BurnishError(f"{root / FACTS} is damaged ({error})", "what `burnish data pairs` wrote",
                           "another --root") from None  # fmt: skip


def _finish(
    root: Path, spool: Spool, specs: Sequence[EnvSpec], request: dict[str, Any], options: dict[str, Any]
) -> Collection:
    """Pair what was recorded and write data set and index atomically."""
    step = request["rollouts"] + 1
    chosen: list[StoredRecording] = []
    pairs: list[Pair] = []
    sizes: list[int] = []
    mixed = 0
    for spec in specs:
        groups: dict[int, list[StoredRecording]] = {}
        for place, path in sorted(spool.attempts(spec.task_id).items()):
            groups.setdefault(place // step, []).append(StoredRecording(path))
        for group in groups.values():
            outcomes = [bool(r.facts["success"]) for r in group]
            arrays = [{"state": r["state"], "action": r["action"]} for r in group]
            found = make_pairs(outcomes, [r.facts["length"] for r in group], arrays, **options)
            first = len(chosen)
            pairs += [Pair((first + p.chosen[0], p.chosen[1]), (first + p.rejected[0], p.rejected[1])) for p in found]
            chosen += group
            sizes.append(len(group))
            mixed += 0 < sum(outcomes) < len(outcomes)
    solved = [bool(r.facts["success"]) for r in chosen]
    facts = {**request, **options, "outcomes": solved, "group_sizes": sizes}
    with new_folder(root) as folder:
        family = request["env"].partition(":")[0]
        assemble(folder, root.name, chosen, spool.spec(specs[0].task_id), request["image_size"], family)
        write_index(folder, pairs, {"source": "rollouts", **facts})
        mark(folder, KIND)
    return Collection(root, len(pairs), len(chosen), sum(solved), mixed, len(sizes))
