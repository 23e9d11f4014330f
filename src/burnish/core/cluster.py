"""Workers on a Ray cluster (extra `scale`): the engine behind `--engine ray`.

Ray pickles whatever it sends, which here are functions of ours, plain data and arrays. Whoever reaches a Ray cluster
can run code on it: it consists of trusted machines. The one made here listens on 127.0.0.1 and ends with its command.
"""

import logging
import os
import re
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from burnish.core.errors import BurnishError, one_line
from burnish.core.workers import DONE, FAILED, GRACE, Crew, Engine, Gone, Worker, count_workers, report

REACH, BEGIN, LOOK = 10.0, 120.0, 2.0
"""Seconds to wait for a cluster to answer, for workers to begin, and between looks at its nodes meanwhile."""
_ADDRESS = re.compile(r"auto|(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):\d{1,5}")
_IP = re.compile(r"^\s*ip: (\S+)", re.M)


def choose_engine(name: str, num_gpus: float | None = None, *, trains: bool = False) -> Engine:
    """The engine of that name.

    Args:
        name: "processes" of this machine; "ray", a cluster made here; "ray:HOST:PORT" or "ray:auto", one that runs.
        num_gpus: GPUs of the cluster for each worker; None means none, or 1 where the workers train and it has any.

    Raises:
        BurnishError: an unknown name, Ray not installed, GPUs without Ray.
    """
    kind, colon, address = name.partition(":")
    if name == "processes" and not num_gpus:
        return Engine()
    if kind != "ray" or (colon and not _ADDRESS.fullmatch(address)):
        found = f"--num-gpus {num_gpus:g} with the engine {name}" if name == "processes" else f"engine {name[:60]!r}"
        raise BurnishError(found, "processes, ray, ray:auto or ray:HOST:PORT", "--engine ray")
    if num_gpus is not None and not (0 <= num_gpus <= 1 or num_gpus in range(1025)):
        raise BurnishError(f"{num_gpus} GPUs for each worker", "0 to 1, such as 0.5, or a whole number up to 1024")
    if find_spec("ray") is None:
        raise BurnishError("an engine of Ray without Ray", "the package ray", "pip install 'burnish[scale]'")
    return RayEngine(address, num_gpus, trains)


class RayEngine(Engine):
    """Workers as actors; each takes one CPU of the cluster, and `num_gpus` of its GPUs (see `choose_engine`).

    A connection that this process has already is used and left open.
    """

    ray: ModuleType

    def __init__(self, address: str, num_gpus: float | None, trains: bool):
        self.address, self.trains, self.asked = address, trains, num_gpus
        self.num_gpus, self.num_cpus, self._ours = 0.0, 1, False

    def __enter__(self) -> "RayEngine":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` Ray would upload the folder
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # simulators may render on a GPU
        if not self.address and "ray" not in sys.modules:
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's way to say 127.0.0.1, when imported
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # of 40 s each, where something else has the port
        import ray

        self.ray = ray
        if not ray.is_initialized():
            self._connect()
            self._ours = True
            self.num_cpus = 1 if self.address else 0  # workers share the cores of this machine as processes do
        has = self._resources()
        self.num_gpus = float(self.trains and has["GPU"] >= 1) if self.asked is None else self.asked
        return self

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self.address, "logging_level": logging.ERROR, "log_to_driver": False}
        if not self.address:
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": 2**29}
        try:
            if ":" in self.address:  # Ray itself would wait for a minute and then end this process
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), REACH).close()
            self.ray.init(**options)
        except (OSError, RuntimeError, ValueError, OverflowError, self.ray.exceptions.RayError) as error:
            where = f"at {self.address}" if self.address else "on this machine"
            raise BurnishError(f"no Ray cluster {where} ({one_line(error, 200)})", "one of the same Python and Ray",
                               "ray start --head" if self.address else "--engine processes") from None  # fmt: skip

        listens = {node["NodeManagerAddress"] for node in self.ray.nodes()}
        if not self.address and listens != {"127.0.0.1"}:
            self.ray.shutdown()
            raise BurnishError(f"a Ray cluster of this machine alone that listens on {', '.join(listens)}", "127.0.0.1",
                               "export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0")  # fmt: skip

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self.ray.shutdown()
        self._ours = False

    def _resources(self) -> dict[str, float]:
        return {"CPU": 0.0, "GPU": 0.0} | self.ray.cluster_resources()

    def count(self, wanted: int = 0) -> int:
        has = self._resources()
        room = int(has["CPU"]) if self.num_cpus else count_workers()
        most = room if self.num_cpus else max(room, count_workers(wanted))
        if self.num_gpus:
            room, most = (min(limit, int(has["GPU"] / self.num_gpus + 1e-9)) for limit in (room, most))
        if not 1 <= (wanted or room) <= most:
            nodes = sum(node["Alive"] for node in self.ray.nodes())
            shown = f"a Ray cluster with {has['CPU']:g} CPUs and {has['GPU']:g} GPUs on {nodes} nodes"
            raise BurnishError(f"{wanted or 1} workers of {self.num_cpus} CPU and {self.num_gpus:g} GPUs in {shown}",
                               "room for them", f"--workers {most}" if most else "ray status")  # fmt: skip
        return wanted or room

    def start(self, worker: Worker, arguments: tuple[Any, ...], count: int) -> Crew:
        return Actors(self, worker, arguments, count)


class Actors:
    """A crew of actors, and the calls of each that are not answered yet."""

    def __init__(self, engine: RayEngine, worker: Worker, arguments: tuple[Any, ...], count: int):
        self.engine, self.ray, self._inside = engine, engine.ray, (worker, arguments)
        self._kind = self.ray.remote(Seat).options(
            num_cpus=engine.num_cpus, num_gpus=engine.num_gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._actors: list[Any] = [None] * count
        self._calls: list[deque[Any]] = [deque() for _ in range(count)]
        try:
            self._begin(range(count))
        except BaseException:
            self.close()
            raise

    def _begin(self, numbers: Iterable[int]) -> None:
        """Make the actors of these numbers and wait until all of them have begun."""
        for number in numbers:
            self._actors[number] = self._kind.remote(*self._inside)
            self._calls[number].clear()
        begun = [self._actors[number].begin.remote(os.getcwd(), version("burnish")) for number in numbers]
        waiting, ready, left = begun, [], BEGIN
        while waiting and left > 0:
            self.engine.count(len(self._actors))  # says so where a node is gone and the others have no room
            ready, waiting = self.ray.wait(begun, num_returns=len(begun), timeout=LOOK)
            left -= LOOK
        for call in ready:
            try:
                refusal = self.ray.get(call)
            except self.ray.exceptions.RayError as error:
                last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
                raise BurnishError(f"a worker on Ray cannot begin ({' '.join(last)[:200]})",
                                   "burnish, the same on every node") from None  # fmt: skip
            if refusal:
                raise BurnishError(*refusal)
        if waiting:
            raise BurnishError(f"{len(waiting)} of {len(begun)} workers on Ray did not begin within {BEGIN:.0f} s",
                               "CPUs and GPUs that no other job holds", "ray status")  # fmt: skip

    def send(self, number: int, task: Any) -> None:
        self._calls[number].append(self._actors[number].do.remote(task))

    def ready(self) -> list[int]:
        first = {calls[0]: number for number, calls in enumerate(self._calls) if calls}
        if not first:
            return []
        self.ray.wait(list(first), num_returns=1)
        found, _ = self.ray.wait(list(first), num_returns=len(first), timeout=0)
        return sorted(first[call] for call in found)

    def answer(self, number: int) -> tuple[str, Any]:
        try:
            return self.ray.get(self._calls[number].popleft())
        except self.ray.exceptions.RayTaskError as error:  # a result that cannot be pickled
            return FAILED, (one_line(error.cause or error), str(error))
        except self.ray.exceptions.RayError as error:
            place = _IP.search(str(error))
            where = f" on {place[1]}" if place else ""
            raise Gone(f"ended{where} ({type(error).__name__})", "fewer --workers if memory ran out") from None

    def replace(self, number: int) -> bool:
        self.ray.kill(self._actors[number])  # perhaps it is only out of reach
        self._begin([number])
        return True

    def close(self) -> None:
        actors = [actor for actor in self._actors if actor is not None and self.ray.is_initialized()]
        self._actors.clear()
        if actors:
            ends = [actor.end.remote() for actor in actors]
            self.ray.wait(ends, num_returns=len(ends), timeout=GRACE)
        for actor in actors:
            self.ray.kill(actor)


class Seat:
    """The actor: a worker's generator, with its tasks one by one."""

    def __init__(self, worker: Worker, arguments: tuple[Any, ...]):
        self._tasks: deque[Any] = deque()
        self._results = worker(self._given(), *arguments)
        self._said: tuple[str, Any] = (DONE, None)

    def _given(self) -> Iterator[Any]:
        while self._tasks:
            yield self._tasks.popleft()

    def begin(self, folder: str, expected: str) -> tuple[str, ...]:
        """Go to the folder of the caller; why that is no use, or nothing."""
        import ray

        node = f"the node {ray.util.get_node_ip_address()}"
        if version("burnish") != expected:
            return f"{node} has burnish {version('burnish')}", expected
        try:
            os.chdir(folder)
        except OSError:
            return f"{node} has no folder {folder}", "a file system that all nodes share"
        return ()

    def do(self, task: Any) -> tuple[str, Any]:
        """The worker's answer to a task, as `Crew.answer` has it."""
        self._tasks.append(task)
        with ExitStack() as stack:
            stack.push(partial(report, self._say))
            self._say(DONE, next(self._results))
        return self._said

    def _say(self, outcome: str, value: Any) -> None:
        self._said = outcome, value

    def end(self) -> None:
        self._results.close()
