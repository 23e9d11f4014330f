"""`burnish eval`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from burnish.cli.parser import Arg
from burnish.core.config import CacheConfig, DataConfig, DelayConfig
from burnish.core.errors import BurnishError


def evaluate(
    policy: str, env: str = "", *, output: Path, data: Path | None = None, episodes: int = 100,
    first_state: int = 1_000_000, seed: int = 0, workers: int = 0, batch_size: int = 0, max_steps: int = 0,
    image_size: int | None = None, cameras: Annotated[list[str], Arg(several=True)] = (),
    n_action_steps: Annotated[int | None, Arg(short="--replan")] = None, device: str = "",
    instruction_swap: bool = False, video: bool = True, engine: str = "processes", num_gpus: float | None = None,
    delay: str = "", async_mode: Annotated[str, Arg(short="--async")] = "sync", jacobian: str = "auto",
    schedule: str = "exp", clip: float = 0.0, carry: int = 0, sampler: str = "",
    tier: Literal["", "exact", "fused", "compiled", "bf16"] = "", cache: str = "", watchdog: Path | None = None,
    held_out: Annotated[list[int], Arg(several=True)] = (), every: int = 0, instruction: str = "", json: bool = False,
) -> None:  # fmt: skip
    """Measure a policy in closed loop, or with --data offline, against the recorded actions of held-out episodes.

    The same command again continues a killed evaluation. `burnish compare` compares two of them.

    Args:
        policy: LeRobot policy folder, a shipped base (small), or expert, random_object
        env: environment id, e.g. tabletop:lift, metaworld:mt10, libero:spatial/3, libero:spatial+exact
        output: folder of this evaluation
        data: LeRobotDataset, in place of an environment
        episodes: for each task; of a data set in all
        first_state: first initial state, where they are unlimited
        seed: seed of the policy's noise
        workers: simulator processes; 0 means one for each core
        batch_size: episodes in flight; 0 means four for each worker; offline: observations, 0 means 8
        max_steps: limit in control steps; 0 means the environment's
        image_size: side of square images in pixels; default: the policy's height and width
        cameras: the environment's (or data set's) cameras in the policy's order; default: same names
        n_action_steps: actions executed of each chunk; default: the policy's
        device: torch device of the policy; default: a GPU where there is one
        instruction_swap: name another object in the instruction; offline that is always measured too
        video: film no episode; offline: draw none
        engine: where simulators run: processes of this machine, ray, or ray:HOST:PORT, a cluster that runs
        num_gpus: GPUs of the Ray cluster for each simulator; default: none
        delay: control steps between an observation and the chunk for it, or p95:FILE of a latency that was measured
        async_mode: what is done meanwhile: sync (stand still), naive, ensemble, bid, inpaint, guided, trained, tokens
        jacobian: of guided: vjp or identity; auto: the policy's
        schedule: how the pull of the old chunk falls behind the delay: exp, linear or hard
        clip: greatest pull; 0 means the number of flow steps
        carry: of tokens: replans for which those behind the executed steps are kept
        sampler: of a flow-matching policy: name:passes, a file of `burnish policy verify runtime`, or auto
        tier: run the policy by the executor; default: as LeRobot does
        cache: exact (find again what equal pictures gave), or a file of `burnish policy verify runtime` (use old ones)
        watchdog: index of the training set (burnish data index); the records then say how far from it the policy was
        held_out: offline: episodes to measure on; default: those that the policy's run left out, else all
        every: offline: control steps between two predictions; 0 means a quarter of a second
        instruction: offline: the other sentence; default: one of the data set's
        json: print what OUTPUT/summary.json says, and nothing else

    Examples:
        burnish eval runs/lift/policy tabletop:lift --episodes 100 --output runs/lift/eval/tuned
        burnish eval small tabletop:reach --delay 2 --replan 4 --async guided --output runs/reach/guided2
        burnish eval runs/mine/policy --data data/mine --output runs/mine/eval/offline
    """
    trials = {"output": output, "episodes": episodes, "seed": seed, "video": video}
    acting = {"batch_size": batch_size, "device": device, "cameras": cameras or None, "sampler": sampler, "tier": tier}
    simulated = {"workers": workers, "max_steps": max_steps, "num_gpus": num_gpus}
    simulated |= {} if engine == "processes" else {"engine": engine}
    moving = {"n_action_steps": n_action_steps, "instruction_swap": instruction_swap}
    late = (delay, async_mode, jacobian, schedule, clip, carry)
    if bool(env) == (data is not None):
        raise BurnishError(f"{policy} with {'both' if env else 'neither of'} an environment and --data", "one of them",
                           f"burnish eval {policy} tabletop:lift --output {output}")  # fmt: skip
    if data is not None:
        unused = {**simulated, **moving, **_given(late), "image_size": image_size, "cache": cache, "watchdog": watchdog}
        _refuse(unused, "--data, which has no use for it")
        found = _offline(policy, data, held_out, every=every, instruction=instruction, **trials, **acting)
    else:
        _refuse({"held_out": held_out, "every": every, "instruction": instruction}, "an environment")
        trials |= {**simulated, "first_state": first_state}
        acting |= {**moving, "watchdog": watchdog or ""}
        found = _closed_loop(policy, env, image_size, late, cache, trials, acting)
    from burnish.evaluate.records import SUMMARY

    print((output / SUMMARY).read_text().strip() if json else f"{found}\nwritten to {output}")


def _given(late: tuple[Any, ...]) -> dict[str, Any]:
    """What was asked of a late policy, by its flag."""
    flags, plain = {"steps": "delay", "measured": "delay", "mode": "async"}, vars(DelayConfig())
    return {flags.get(name, name): True for name, value in vars(DelayConfig.of(*late)).items() if value != plain[name]}


def _refuse(given: dict[str, Any], beside: str) -> None:
    for flag in (name.replace("_", "-") for name, value in given.items() if value):
        raise BurnishError(f"--{flag} with {beside}", "no such flag")


def _offline(policy: str, data: Path, held_out: list[int], **more: Any) -> Any:
    from burnish.evaluate.offline import evaluate_offline, trained_on

    source = trained_on(policy, data) or DataConfig(root=str(data))
    source.held_out = held_out or source.held_out
    return evaluate_offline(policy, source, **more)


def _closed_loop(
    policy: str, env: str, size: int | None, late: tuple[Any, ...], cache: str, trials: dict[str, Any],
    own: dict[str, Any],
) -> Any:  # fmt: skip
    from burnish.evaluate.rollout import evaluate, evaluate_expert

    if policy in ("expert", "random_object"):
        _refuse({**own, **_given(late), "cache": cache}, f"{policy}, which is no policy")
        return evaluate_expert(env, which=policy, image_size=128 if size is None else size, **trials)
    return evaluate(policy, env, image_size=size, delay=DelayConfig.of(*late), cache=CacheConfig.of(cache), **own,
                    **trials)  # fmt: skip
