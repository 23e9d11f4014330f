"""`burnish compare` and `burnish trial`."""

from json import dumps
from pathlib import Path
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


def trial(
    a: str, b: str, *, output: Path, trials: int = 40,
    margin: Annotated[float | None, Arg(metavar="SHARE")] = None, states: Path | None = None, data: Path | None = None,
    task: str = "", port: Annotated[int, Arg(least=0, most=65_535)] = 0, relay_port: int = 8765, json: bool = False,
) -> None:  # fmt: skip
    """Find out whether B is better than A on a robot: pairs of trials that you judge without knowing whose turn it is.

    Prints the address of a page, which shows initial states, takes outcomes, and says when you may stop. The names
    come at the end. The same command again goes on where it stopped.

    Args:
        a: the one policy: a name, or the address of its server, ws://HOST:PORT
        b: the other one; between two addresses a relay stands, which the robot's client connects to
        output: folder of this trial
        trials: pairs at most: how often each policy tries
        margin: success rates that differ by no more count as equivalent, e.g. 0.1 for ten points
        states: folder of initial states: NAME.jpg to match, beside it NAME.json with "instruction" and "setup"
        data: or a LeRobotDataset, whose episodes' first frames are matched
        task: what the robot is told, where the initial states do not say it
        port: of the page; 0 takes a free one
        relay_port: of the one address for the robot's client
        json: print one JSON object at the end

    Examples:
        burnish trial ws://127.0.0.1:8001 ws://127.0.0.1:8002 --states photos --margin 0.1 --output trials/today
        burnish trial old new --trials 20 --output trials/names      somebody else starts what next.txt names
    """
    from json import dumps

    from burnish.evaluate.trial import Trial, TrialOptions
    from burnish.report.trial import Page, write_trial_report

    options = TrialOptions(trials, margin, task, str(states or ""), str(data or ""), relay_port)
    with Trial(output, a, b, options) as run:
        run.connect()
        if run.finished:
            run.finish(len(run.entries))
        else:
            page = Page(run, lambda: write_trial_report(run)[0].read_text(encoding="utf-8"), port)
            robot = f"\nthe robot's client connects to {run.relay.address}" if run.relay else ""
            print(f"judge on {page.address}{robot}", flush=True)
            page.run()
        report, found = write_trial_report(run)
    names = f"A is {run.names['a']}, B is {run.names['b']}\n"
    print(dumps(found.to_dict(), indent=2) if json else f"{names}{found}\nreport: {report}")
