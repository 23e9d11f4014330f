"""Hooks of the docs site (mkdocs.yml): what its pages show of the code and of results/ is made while it is built.

A page asks for it by a line: `<!-- made: commands -->`, `<!-- made: fields MODULE:DATACLASS -->`,
`<!-- made: presets MODULE:NAME -->`, `<!-- made: example FILE -->`, `<!-- made: studies -->`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from burnish.cli.main import COMMANDS
from burnish.cli.parser import CommandParser, Group
from burnish.experiments.plots import write_intervals

ROOT = Path(__file__).parents[1]
MADE = re.compile(r"^<!-- made: (\w+) ?(\S*) -->$", re.M)


def on_files(files, config, **_):
    """Add the figures of the studies under results/ that keep their outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, result, _ in studies():
            picture = write_intervals(result, Path(folder, "study.svg"))
            files.append(File.generated(config, f"img/studies/{name}.svg", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown, **_):
    """Fill in what a page asks for."""
    makers = {
        "commands": commands, "fields": field_table, "presets": presets, "example": example, "studies": gallery,
    }  # fmt: skip
    return MADE.sub(lambda found: makers[found[1]](*filter(None, [found[2]])), markdown)


def commands(name: str = "burnish", found: Any = COMMANDS) -> str:
    """The help of every command, each under a heading."""
    if isinstance(found, Group):
        inside = "\n\n".join(commands(f"{name} {word}", one) for word, one in found.commands.items())
        return inside if found is COMMANDS else f"{heading(name)}\n\n{found.help}\n\n{inside}"
    os.environ["COLUMNS"] = "110"  # argparse's way to be told the width
    return f"{heading(name)}\n\n```text\n{CommandParser(name, found).parser.format_help().rstrip()}\n```"


def heading(name: str) -> str:
    return f"{'#' * min(len(name.split()), 4)} {name}"


def field_table(target: str) -> str:
    """A table of the fields of a dataclass, and one for each of those inside it."""
    tables: dict[str, list[str]] = {}
    for section, name, one in options(named(target)):
        tables.setdefault(section, []).append(row(f"{section}.{name}".lstrip("."), one))
    top = ["| field | default | values | meaning |", "| --- | --- | --- | --- |"]
    return "\n\n".join(
        "\n".join([*([f"### {section}", ""] if section else []), *top, *rows]) for section, rows in tables.items()
    )


def named(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def options(kind: type, section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(section, name, field), those of dataclasses inside after the others."""
    nested = []
    for one in fields(kind):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if is_dataclass(default):
            nested.append((type(default), f"{section}.{one.name}".lstrip(".")))
        else:
            yield section, one.name, (default, one.metadata)
    for inside, name in nested:
        yield from options(inside, name)


def row(name: str, about: tuple[Any, dict[str, Any]]) -> str:
    default, told = about
    signs = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    bounds = [f"{word} {told[key]:,}" for key, word in signs.items() if told.get(key) is not None]
    values = ", ".join(f"`{one}`" if one != "" else "empty" for one in told.get("choices", ())) or ", ".join(bounds)
    shown = "" if default in ("", [], {}, None) else f"`{json.dumps(default, default=str)}`"
    return f"| `{name}` | {shown} | {values} | {told.get('help', '').replace('|', chr(92) + '|')} |"


def presets(target: str) -> str:
    """What each named set of options changes."""
    lines = ["| name | what it changes |", "| --- | --- |"]
    lines += [
        f"| `{name}` | {f'`{json.dumps(given)}`' if given else 'nothing'} |" for name, given in named(target).items()
    ]
    return "\n".join(lines)


def example(name: str) -> str:
    """A script, or the cells of a notebook."""
    text = (ROOT / "examples" / name).read_text()
    if name.endswith(".py"):
        return f"```python\n{text}```"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)


def studies() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, file, content) of the results that are studies with outcomes."""
    for result in sorted((ROOT / "results").glob("*/*.json")):
        content = json.loads(result.read_text())
        if "declared" in content:
            yield result.relative_to(ROOT / "results").with_suffix("").as_posix().replace("/", "-"), result, content


def gallery() -> str:
    """The figure of every study, with the command that made it."""
    return "\n\n".join(
        f"### {name.replace('-', '/', 1)}\n\n![Means of {name} with 95 % intervals](img/studies/{name}.svg)\n\n"
        f"`{content['command']}` · {content['hardware']} · commit {content['commit']}"
        for name, _, content in studies()
    )
