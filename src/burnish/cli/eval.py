"""`burnish eval`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from burnish.cli.parser import Arg
from burnish.core.errors import BurnishError


def evaluate(
    policy: str, env: str, *, output: Path, episodes: int = 100, first_state: int = 1_000_000, seed: int = 0,
    workers: int = 0, batch_size: int = 0, max_steps: int = 0, image_size: int | None = None,
    cameras: Annotated[list[str], Arg(several=True)] = (),
    n_action_steps: Annotated[int | None, Arg(short="--replan")] = None, device: str = "",
    instruction_swap: bool = False, video: bool = True, engine: str = "processes", num_gpus: float | None = None,
    delay: str = "0", async_mode: Annotated[str, Arg(short="--async")] = "sync", jacobian: str = "auto",
    schedule: str = "exp", clip: float = 0.0, carry: int = 0, sampler: str = "",
    tier: Literal["", "exact", "fused", "compiled", "bf16"] = "", cache: str = "none",
) -> None:  # fmt: skip
    """Measure a policy in closed loop.

    The same command again continues a killed evaluation. `burnish compare` compares two of them.

    Args:
        policy: LeRobot policy folder, a shipped base (small), or expert, random_object
        env: environment id, e.g. tabletop:lift, metaworld:mt10, libero:spatial/3, libero:spatial+exact
        output: folder of this evaluation
        episodes: for each task
        first_state: first initial state, where they are unlimited
        seed: seed of the policy's noise
        workers: simulator processes; 0 means one for each core
        batch_size: episodes in flight; 0 means four for each worker
        max_steps: limit in control steps; 0 means the environment's
        image_size: side of square images in pixels; default: the policy's height and width
        cameras: the environment's cameras in the policy's order; default: same names
        n_action_steps: actions executed of each chunk; default: the policy's
        device: torch device of the policy; default: a GPU where there is one
        instruction_swap: name another object in the instruction
        video: film no episode
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

    Examples:
        burnish eval runs/lift/policy tabletop:lift --episodes 100 --output runs/lift/eval/tuned
        burnish eval small tabletop:reach --delay 2 --replan 4 --async guided --output runs/reach/guided2
    """
    from burnish.core.config import CacheConfig, DelayConfig
    from burnish.evaluate.rollout import evaluate, evaluate_expert

    trials = {"episodes": episodes, "first_state": first_state, "seed": seed, "workers": workers, "output": output,
              "max_steps": max_steps, "video": video, "engine": engine, "num_gpus": num_gpus}  # fmt: skip
    own = {"batch_size": batch_size, "cameras": cameras or None, "n_action_steps": n_action_steps, "device": device,
           "instruction_swap": instruction_swap, "sampler": sampler, "tier": tier}  # fmt: skip
    if policy in ("expert", "random_object"):
        _refuse({**own, "delay": delay != "0", "cache": cache != "none"}, policy)
        found = evaluate_expert(env, which=policy, image_size=128 if image_size is None else image_size, **trials)
    else:
        late = DelayConfig.of(delay, async_mode, jacobian, schedule, clip, carry)
        found = evaluate(policy, env, image_size=image_size, delay=late, cache=CacheConfig.of(cache), **own, **trials)
    print(f"{found}\nwritten to {output}")


def _refuse(given: dict[str, Any], policy: str) -> None:
    for flag in (name.replace("_", "-") for name, value in given.items() if value):
        raise BurnishError(f"--{flag} with {policy}, which is no policy", "a policy folder, or no such flag")
