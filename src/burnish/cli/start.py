"""`burnish start` and `burnish doctor`: the first things that a newcomer gives."""

import shlex
from json import dumps
from pathlib import Path
from typing import Annotated

from burnish.cli.parser import Arg


def start(
    data: Path, *, policy: str = "", output: Annotated[Path | None, Arg(short="-o", metavar="FILE")] = None,
    gpu: Annotated[float, Arg(least=0, metavar="GB")] = 0.0, quick: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Look at a data set of yours and write a recipe for it: policy, batch, steps, what is held out to measure on.

    No file of yours is written over. The lines at the end are the commands to go on with.

    Args:
        data: LeRobotDataset folder, v2.0 to v3.0
        policy: LeRobot policy folder to fine-tune, a shipped base, or act or diffusion from scratch; default: act
        output: recipe to write, which names the run; default: the data set's name, in this folder
        gpu: plan for a card of so many GB; default: what is here
        quick: do not read every video to its end
        json: print one JSON object instead

    Examples:
        burnish start data/my_robot
        burnish start data/my_robot --policy smolvla_base --gpu 24
    """
    from burnish.experiments.start import propose
    from burnish.report.inspection import as_summary

    found = propose(data, policy, gpu=gpu, quick=quick, output=output)
    path = output or Path(f"{found.values['name']}.yaml")
    found.write(path)
    words = ["burnish", "run", str(path)]
    run = Path("runs") / found.values["name"]
    then = [shlex.join([*words, "--train.steps=20", f"--output={run}-try"]), shlex.join(words)]
    if json:
        problems = [vars(problem) | {"sentence": problem.sentence} for problem in found.inspection.problems]
        print(dumps({"recipe": str(path), "values": found.values, "preset": found.preset, "bytes": found.peak,
                     "room": found.room, "minutes": found.minutes, "left_out": found.left_out, "problems": problems,
                     "remarks": found.remarks, "commands": then}))  # fmt: skip
        return
    print("\n".join([as_summary(found.inspection), "", *found.facts]))
    print(f"\n{path} is written. Try it with 20 steps, then all of it:\n  {then[0]}\n  {then[1]}")


def doctor(*, json: bool = False) -> int:
    """Say whether this machine can do what burnish does, with a remedy for what is missing.

    Exit status: 0 when nothing will fail, 1 otherwise.

    Args:
        json: print one JSON object

    Example:
        burnish doctor --json
    """
    from burnish.experiments.doctor import examine

    found = examine()
    failed = [one for one in found if one.ok is False]
    if json:
        print(dumps({"ok": not failed, "findings": [vars(one) for one in found]}))
    else:
        print("\n".join([*map(str, found), f"{len(failed)} of {len(found)} will fail" if failed else "all is well"]))
    return int(bool(failed))
