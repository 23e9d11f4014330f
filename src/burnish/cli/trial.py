"""`burnish trial`."""

from pathlib import Path
from typing import Annotated

from burnish.cli.parser import Arg


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
    from burnish.report.trial import write_trial_report
    from burnish.report.trial_server import Page

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
    print(dumps(found.to_dict(), indent=2) if json else f"{found}\nreport: {report}")
