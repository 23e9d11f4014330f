"""`burnish policy serve`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from burnish.cli.parser import Arg
from burnish.core.config import CacheConfig
from burnish.core.errors import BurnishError

Several = Annotated[list[str], Arg(several=True)]
Place = Path | None


def serve(
    policy: str, *, protocol: Literal["openpi", "vla-eval"] = "openpi", host: str = "127.0.0.1", port: int = 8000,
    token_file: Place = None, profile: Literal["lerobot", "libero", "droid", "aloha"] = "lerobot", map: Place = None,
    cameras: Several = (), lerobot_port: int = -1, width: int = 8, wait_ms: float = 3.0, exact: bool = False,
    async_mode: Annotated[str, Arg(short="--async")] = "none", max_mb: int = 16, rate: int = 200, clients: int = 32,
    record: Place = None, record_mb: int = 1000, n_action_steps: int | None = None, tier: str = "", sampler: str = "",
    cache: str = "", data: Place = None, watchdog: Place = None, seed: int = 0, device: str = "",
) -> None:  # fmt: skip
    """Serve a policy to robots and benchmarks over the network, until Ctrl-C.

    openpi-client, burnish.runtime.client and LeRobot's RobotClient are answered as they are; others only with a token.

    Args:
        policy: policy folder or the name of a shipped base
        protocol: openpi, or vla-eval for vla-eval's benchmarks
        host: address to listen on
        port: 0 takes a free one
        token_file: file with what clients must send
        profile: names of keys in observations: LeRobot's, or those of an example of openpi's
        map: file that names the keys instead, {images: {CAMERA: KEY}, state: KEY, task: KEY}
        cameras: the client's cameras in the policy's order; default: same names
        lerobot_port: port for LeRobot's RobotClient; 0 takes a free one, -1 means none
        width: most requests in a call of the policy
        wait_ms: a request waits so long for others
        exact: all calls of one width, so that an answer never depends on others
        async_mode: how a chunk goes on from a session's last one: none, guided, inpaint, trained
        max_mb: largest message in MiB
        rate: requests a second of a connection
        clients: connections at once
        record: folder for what is asked and answered
        record_mb: most MiB to record
        n_action_steps: vla-eval: actions executed of each chunk; default: the policy's
        tier: run the policy by the executor: exact, fused, compiled, bf16; default: as LeRobot does
        sampler: of a flow-matching policy: name:passes, a file of `burnish policy verify runtime`, or auto
        cache: exact (find again what equal pictures gave), or a file of `burnish policy verify runtime` (use old ones)
        data: data set whose frame rate and names of actions clients are told
        watchdog: index of the training set (burnish data index); replies then say how far from it an observation is
        seed: seed of the policy's noise
        device: torch device; default: a GPU where there is one

    Examples:
        burnish policy serve runs/so101/policy --lerobot-port 8080 --record calls
        burnish policy serve runs/libero/policy --host 0.0.0.0 --token-file token
    """
    from burnish.runtime.serve import run

    bench = protocol == "vla-eval"
    own = (map, lerobot_port >= 0, record, exact, async_mode != "none", profile != "lerobot", tier, sampler, data)
    _check(bench, any(own) or bool(cache or watchdog), n_action_steps)
    options = run.ServeOptions(
        host=host, port=port, token=run.read_token(token_file) if token_file else "", max_mb=max_mb, rate=rate,
        clients=clients, keepalive=not bench, lerobot_port=lerobot_port, profile=profile, map=str(map or ""),
        cameras=cameras, width=width, wait_ms=wait_ms, exact=exact, async_mode=async_mode, seed=seed,
        record=str(record or ""), record_mb=record_mb, tier=tier, sampler=sampler, data=str(data or ""),
        cache=CacheConfig.of(cache))  # fmt: skip
    if bench:
        run.serve_benchmark(policy, options, n_action_steps, device, _announce)
    else:
        run.serve_policy(policy, options, device=device, ready=_announce, watchdog=_watcher(watchdog))
    print("stopped")


def _watcher(index: Path | None) -> Any:
    from burnish.methods.retrieve.ask import watch

    return index and partial(watch, index)


def _check(bench: bool, own: bool, n_action_steps: int | None) -> None:
    if bench and own:
        raise BurnishError("vla-eval with options of openpi's protocol", "host, port, token_file, cameras and limits",
                           "--protocol openpi")  # fmt: skip
    if not bench and n_action_steps is not None:
        raise BurnishError("--n-action-steps with openpi's protocol", "a client that decides it", "--protocol vla-eval")


def _announce(server: Any, port: int, _: object) -> None:
    host = f"[{server.options.host}]" if ":" in server.options.host else server.options.host
    robots = f", LeRobot's client on {host}:{server.lerobot_port}" if server.lerobot_port >= 0 else ""
    print(f"policy on ws://{host}:{port}{robots}", flush=True)
