"""Steps that the policies of a study go through one after the other, each of which a variant may leave out.

A step is a list of commands that make `{to}/policy` of the policy in `{before}`. Variants that agree in their first
steps share them: the folder of a step is named after everything that was done before it. Commands that ran to their end
are remembered beside the folder, and not repeated.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.files import alone
from burnish.core.options import option, read_options
from burnish.core.recipe import check_name
from burnish.experiments.pipeline import Stages

SETUP = ("workshop", "bench")
"""What `python -m` may name in a command, beside the commands of burnish itself: a study may come from anywhere."""
MOST_NAMED = 200
"""Characters in the names of all steps together: a folder is named after them."""

SetupRunner = Callable[[str], int]
"""Runs one command line and returns its exit status."""


@dataclass
class Step:
    """What a step does, and what stands in its place where it is left out."""

    run: list[str] = option([], "commands that make {to}/policy of the policy {before}")
    otherwise: list[str] = option([], "in place of them where the step is left out; none: the policy stays as it is")
    eval: dict[str, Any] = option({}, "changes of `eval` where the step is taken")


@dataclass(frozen=True)
class Link:
    """A step of one variant and seed: its folder, its commands as they are run, and those of all steps before it."""

    to: Path
    lines: tuple[str, ...]
    after: tuple[str, ...] = ()

    def clock(self, facts: dict[str, Any]) -> Stages:
        """What is known of it, in a file beside the folder, which belongs to the commands."""
        return Stages(self.to.with_name(f"{self.to.name}.json"), facts)


def read_steps(entries: Any, variants: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """The steps of a study file, checked together with what its variants leave out."""
    steps = {}
    for name, entry in entries.items():
        check_name(str(name), f"{where}: a name in steps", parts=1)
        if not isinstance(entry, dict):
            raise BurnishError(f"{where}: step '{name}' is {str(entry)[:100]}", "run, otherwise and eval")
        step = read_options(Step, entry, f"{where}: step '{name}'")
        if not (step.run or step.eval):
            raise BurnishError(f"{where}: step '{name}' does nothing", "run or eval")
        for line in (*step.run, *step.otherwise):
            check_command(line, f"{where}: {str(line)[:100]!r} in step '{name}'")
        steps[name] = asdict(step)
    if sum(len(name) + 4 for name in steps) > MOST_NAMED:
        raise BurnishError(f"{where}: the names of the {len(steps)} steps", f"at most {MOST_NAMED} characters in all")
    for name, changes in variants.items():
        left = changes.get("without", [])
        if not isinstance(left, list) or not all(isinstance(one, str) and one in steps for one in left):
            known = f"a list of some of {', '.join(steps)}" if steps else "a study with steps"
            raise BurnishError(f"{where}: variant '{name}' is without {str(left)[:100]}", known)
        if steps and (other := sorted(changes.keys() - {"without", "eval"})):
            raise BurnishError(f"{where}: variant '{name}' of a study with steps has {other[0]}", "without and eval")
    return steps


def chain(
    steps: Mapping[str, Mapping[str, Any]], without: Sequence[str], start: str, seed: int, out: Path
) -> tuple[list[Link], str]:
    """The steps of one variant and seed that have commands, and the policy at their end.

    Args:
        steps: of `read_steps`.
        without: those that the variant leaves out.
        start: the policy that the first one begins with.
        out: the study's folder.
    """
    links: list[Link] = []
    policy, names = start, []
    for name, step in steps.items():
        lines = step["otherwise" if name in without else "run"]
        if lines:
            names.append(f"no_{name}" if name in without else name)
            to = out / "steps" / str(seed) / ".".join(names)
            places = {"before": shlex.quote(policy), "to": shlex.quote(str(to))}
            after = (*links[-1].after, *links[-1].lines) if links else ()
            links.append(Link(to, tuple(fill(line, seed, shlex.quote(str(out)), **places) for line in lines), after))
            policy = str(to / "policy")
    return links, policy


def take(links: Iterable[Link], facts: dict[str, Any], run_setup: SetupRunner | None) -> None:
    """Run the commands of these steps that have not been run."""
    for link in links:
        with alone(link.to.parent):  # another process may be at it
            clock = link.clock(facts)
            made_by = [*link.after, *link.lines]
            if clock.content.setdefault("made_by", made_by) != made_by:
                found = f"{link.to} was made by other commands than the study has now"
                raise BurnishError(found, "the study that made it", f"rm -r '{link.to}' '{clock.file}'")
            for line in link.lines:
                set_up(line, clock, run_setup)
        if not (link.to / "policy").is_dir():
            raise BurnishError(f"the commands of a step left no {link.to / 'policy'}", "a policy there")


def step_minutes(links: Iterable[Link]) -> float:
    """What these steps took, those of them too that were made for another variant."""
    return sum(link.clock({}).minutes for link in links)


def check_command(line: Any, what: str) -> None:
    """Raise BurnishError unless `line` is a command that a study may run; the message begins with `what`."""
    try:
        words = shlex.split(line) if isinstance(line, str) else []
    except ValueError as error:
        raise BurnishError(f"{what} cannot be split ({error})") from None
    if not words:
        raise BurnishError(what, "a command")
    if words[0] == "python" and (words[1:2] != ["-m"] or not set(words[2:3]) & set(SETUP)):
        raise BurnishError(what, f"burnish's, or python -m {' or '.join(SETUP)}")


def fill(value: Any, seed: int, out: Path | str, **places: str) -> Any:
    """`value` with {seed}, {out} and `places` filled in, inside lists and mappings too; quoted for a command."""
    if isinstance(value, str):
        for name, text in {"seed": str(seed), "out": str(out), **places}.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, dict):
        return {key: fill(item, seed, out, **places) for key, item in value.items()}
    return [fill(item, seed, out, **places) for item in value] if isinstance(value, list) else value


def set_up(line: str, stages: Stages, run_setup: SetupRunner | None) -> None:
    """One command; the stages file remembers those that came to their end."""
    if line in stages.content.setdefault("done", []):
        return
    if run_setup is None:
        found = f"nothing runs the setup command '{line}'"
        raise BurnishError(found, "a function run_setup(line)", "burnish run STUDY")
    with stages.stage(line):
        if run_setup(line):
            raise BurnishError(f"the setup command failed: {line}")
    stages.content["done"].append(line)
    stages.write()
