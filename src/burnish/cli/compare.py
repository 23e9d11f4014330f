"""`burnish compare`."""

from json import dumps
from typing import Annotated

from burnish.cli.parser import Arg

FURTHER = Arg(metavar="PATH")


def compare(
    first: str, second: str, *, a: Annotated[list[str], FURTHER] = (), b: Annotated[list[str], FURTHER] = (),
    task_regex: str | None = None, seed: Annotated[int, Arg(least=0)] = 0,
    margin: Annotated[float | None, Arg(least=0.0, most=1.0)] = None, sequential: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Compare two evaluations, paired on the initial states.

    Each is an evaluation folder, a file with one JSON object per line (task, seed or initial_state or trial, success),
    or what lerobot-eval, vla-eval or openvla-oft wrote. Trials are paired on task and initial state.

    Args:
        first: A, for instance the base
        second: B, for instance the tuned policy; differences are B minus A
        a: a further run of A; repeat at will
        b: a further run of B; repeat at will
        task_regex: only tasks in which this is found
        seed: seed of the bootstrap
        margin: success rates that differ by no more count as equivalent, e.g. 0.05 for five points
        sequential: also the test that may be looked at after every trial, and says when to stop
        json: print one JSON object

    Examples:
        burnish compare runs/lift/eval/base runs/lift/eval/tuned
        burnish compare lerobot0/eval_info.json lerobot1/eval_info.json
        burnish compare base.jsonl tuned.jsonl --task-regex 'spatial/[0-4]$' --json
        burnish compare today_a.jsonl today_b.jsonl --sequential --margin 0.1      after each trial on the robot
        burnish compare base/seed0 tuned/seed0 --a base/seed1 --b tuned/seed1      several runs of each
    """
    from burnish.evaluate.compare import compare

    found = compare([first, *a], [second, *b], task_regex=task_regex, seed=seed, margin=margin, sequential=sequential)
    print(dumps(found.to_dict(), indent=2) if json else found)
