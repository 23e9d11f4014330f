"""A policy folder to a running server."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.reading import regular_file
from burnish.data.dataset import open_dataset
from burnish.data.watchdog import Watchdog
from burnish.policies.base import Policy
from burnish.policies.keys import ACTION
from burnish.policies.load import policy_and_hash
from burnish.runtime.caches import Reuse, keeping
from burnish.runtime.choose import find_sampler, own_sampler, using_sampler
from burnish.runtime.executor import Runtime
from burnish.runtime.serve.batcher import Batcher
from burnish.runtime.serve.openpi import OpenPi
from burnish.runtime.serve.record import Recorder
from burnish.runtime.serve.rows import profile_keys, read_keys
from burnish.runtime.serve.server import NEW_TOKEN, InThread, ServeOptions, Server, serve
from burnish.runtime.serve.vla_eval import VlaEval, refusal
from burnish.sampling.kept import Kept


def serve_policy(
    policy: Policy | Path | str, options: ServeOptions | None = None, *, device: str = "",
    ready: Callable[[Server, int, Callable[[], None]], None] | None = None,
    watchdog: Callable[[Policy, str], Watchdog] | None = None,
) -> None:  # fmt: skip
    """Serve a policy by openpi's protocol, and LeRobot's where a port is given, until SIGINT or SIGTERM.

    Args:
        policy: a policy, its folder, or the name of a shipped base.
        options: see `ServeOptions`.
        device: torch device; default: a GPU where there is one.
        ready: called once the policy is warm, with the server, its port and a function that ends it from any thread.
        watchdog: makes what measures how far an observation is from the training set, of the policy and its hash.

    Raises:
        BurnishError: the policy cannot be loaded or does not act, options that do not fit it, see also `serve`.
    """
    options, running = options or ServeOptions(), []

    def make(server: Server) -> OpenPi:
        running.append(server)
        model, digest = policy_and_hash(policy, device)
        keys = read_keys(model, Path(options.map)) if options.map else (
            profile_keys(model, options.profile, options.cameras))  # fmt: skip
        robot_keys = profile_keys(model, "lerobot", options.cameras if options.profile == "lerobot" else ())
        mode = options.async_mode
        stack.enter_context(using_sampler(model, find_sampler(options.sampler, policy)))
        who, reuse = runner(model, options, stack, server)
        dog = watchdog(model, digest) if watchdog else None
        batcher = Batcher(model, server.thread, server.metrics, options.width, options.wait_ms / 1000, options.exact,
                          "guided" if mode == "none" else mode, who, reuse, dog)  # type: ignore[arg-type]  # fmt: skip
        recorder = Recorder(Path(options.record), options.record_mb, server.metrics) if options.record else None
        if recorder:
            stack.callback(recorder.close)
        names = () if isinstance(policy, Policy) else (str(policy), Path(policy).name)
        sampler = model.sampler or (own_sampler(model) if model.supports("runtime") else "")
        about = {"weights": digest, "profile": "map" if options.map else options.profile, "exact": options.exact,
                 "sampler": sampler, "tier": options.tier, "cache": options.cache.mode, "max_mb": options.max_mb,
                 **({"watchdog": dog.about} if dog else {}), **robot(options.data)}  # fmt: skip
        service = OpenPi(batcher, keys, options.seed, about, mode, recorder, robot_keys, names)
        service.warm()
        return service

    with ExitStack() as stack:
        serve(make, options, ready and (lambda port, stop: ready(running[0], port, stop)))


def runner(
    model: Policy, options: ServeOptions, stack: ExitStack, server: Server
) -> tuple[Policy | Runtime, Reuse | None]:
    """Who is called, the policy or the executor of it; and what lets it act on old pictures."""
    cache, kept = options.cache, None if options.cache.mode == "none" else Kept()
    reuse = Reuse(cache, model, 2 * options.clients) if cache.mode in ("images", "prefix") else None
    server.metrics.caches = [one.counts for one in (kept, reuse) if one is not None]
    if options.tier or (kept and model.supports("runtime")):
        return Runtime(model, tier=options.tier or "exact", kept=kept), reuse
    if kept:
        stack.enter_context(keeping(model, kept))
    return model, reuse


def robot(data: str) -> dict[str, Any]:
    """What clients want to know of the robot, as its data set has it: "fps" and "action_names"; None where unknown."""
    found = open_dataset(Path(data)) if data else None
    return {"fps": found and found.fps, "action_names": found and found.features[ACTION]["names"]}


def serve_benchmark(
    policy: Policy | Path | str, options: ServeOptions, n_action_steps: int | None = None, device: str = "",
    ready: Callable[[Server, int, Callable[[], None]], None] | None = None,
) -> None:  # fmt: skip
    """Serve a policy to vla-eval's benchmarks; see `serve_policy` and `VlaEval`."""
    running: list[Server] = []

    def make(server: Server) -> InThread:
        running.append(server)
        model = VlaEval(policy_and_hash(policy, device)[0], options.cameras, n_action_steps, options.seed)
        model.warm()
        return InThread(server, model.session, refusal)

    serve(make, options, ready and (lambda port, stop: ready(running[0], port, stop)))


def read_token(path: Path) -> str:
    """The token in a file, without space around it.

    Raises:
        BurnishError: no such file, or something that is no token of 16 to 512 printable characters in it.
    """
    if not path.exists():
        raise BurnishError(f"no token at {path}", "a file with one", NEW_TOKEN.replace("> token", f"> {path}"))
    token = regular_file(path, most=4096).read_text(encoding="utf-8", errors="replace").strip()
    if not 16 <= len(token) <= 512 or not token.isascii() or not token.isprintable() or " " in token:
        raise BurnishError(f"{path} holds no token", "16 to 512 letters, digits and signs without a space",
                           NEW_TOKEN.replace("> token", f"> {path}"))  # fmt: skip
    return token
