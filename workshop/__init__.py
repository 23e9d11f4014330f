"""How the shipped base, the scene teacher and the language VLM were made: `python -m workshop NAME`."""

from datetime import UTC, datetime
from typing import Any


def stamped(command: str, **content: Any) -> dict[str, Any]:
    """The content of a result file in the form of a bench: `content` (n, figures, targets) and where it comes from."""
    from burnish.core.provenance import commit, machine

    versions = machine()
    return {
        "name": command.split()[3], "command": command, "device": versions.pop("device"), "versions": versions,
        "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), **content,
    }  # fmt: skip
