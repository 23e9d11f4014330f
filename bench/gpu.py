"""What burnish does on a GPU, in parts: `python bench/gpu.py [--out results/gpu] [--parts serve loop] [--rehearse]`.

Every part runs in a process of its own, has a budget (together under eight minutes on an H100), and leaves one JSON
file, whole or absent. A part that overruns is stopped, and what it has measured by then is written. Called again, the
script leaves out what was finished with the same code. Nothing beyond burnish's own dependencies is
needed, no network and no weights: policies are drawn at random on the device (workshop/real.py).
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# As a script it would see bench/train.py and the like as `train`, and not the packages beside them.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "bench"))]


@dataclass(frozen=True)
class Part:
    """One file of results.

    Args:
        seconds: on an H100, after which it is stopped.
        where: module and the name of its generator of (measurement, figures); `<name>_figures` or `figures` of the
            module make the flat table of all measurements.
        targets: of figures, in words.
    """

    seconds: float
    where: str
    figures: str
    targets: dict[str, str] = field(default_factory=dict)


PARTS: dict[str, Part] = {
    "parity": Part(30, "bench.gpu_parity:run", "bench.gpu_parity:figures"),
    "smolvla": Part(100, "bench.gpu_train:smolvla", "bench.gpu_train:smolvla_figures"),
    "pi05": Part(65, "bench.gpu_train:pi05", "bench.gpu_train:pi05_figures"),
    "act_smolvla": Part(75, "bench.gpu_run:act_smolvla", "bench.gpu_run:act_figures"),
    "act_pi05": Part(60, "bench.gpu_run:act_pi05", "bench.gpu_run:act_figures"),
    "decode_3b": Part(30, "bench.gpu_run:decode_3b", "bench.gpu_run:decode_figures"),
    "decode_7b": Part(35, "bench.gpu_run:decode_7b", "bench.gpu_run:decode_figures"),
    "loop": Part(30, "bench.gpu_run:loop", "bench.gpu_run:loop_figures"),
    "serve": Part(30, "bench.gpu_run:serve", "bench.gpu_run:serve_figures"),
}
PRELOADED = ("torch", "lerobot.policies.factory", "peft", "accelerate", "transformers", "burnish.policies.load",
             "burnish.train.loop", "burnish.evaluate.rollout", "workshop.real")  # fmt: skip
"""Imported once where parts are forked, in rehearsals on the CPU. Not on a GPU: torchao, which transformers imports
where it is installed, starts CUDA, and a fork could not use it any more.
"""


def main(argv: list[str]) -> int:
    """Run the parts that are not finished; 1 where one failed or was stopped."""
    from burnish.core.errors import BurnishError

    args = make_parser().parse_args(argv)
    out = args.out or ROOT / ("runs/gpu-rehearsal" if args.rehearse else "results/gpu")
    try:
        if out.exists() and not out.is_dir():
            raise BurnishError(f"--out {out} is a file", "a folder", "another --out")
        return run_parts(args.parts, out, args.rehearse, args.commit)
    except BurnishError as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of the results; default: results/gpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)}; default: all")  # fmt: skip
    parser.add_argument("--rehearse", nargs="?", const="cpu", default="", choices=("cpu", "cuda"), metavar="DEVICE",
                        help="tiny sizes, on the CPU or with 'cuda' on a GPU: a check that all runs")  # fmt: skip
    parser.add_argument("--commit", default="", help="of this code, where the machine has no git")
    return parser


def run_parts(names: list[str], out: Path, rehearse: str, commit: str = "") -> int:
    """Run `names` one after the other; files appear as <out>/<part>.json. `rehearse`: on which device, "" means not."""
    from burnish.core.files import write_json

    code = code_hash()
    todo = [name for name in names if not is_finished(out / f"{name}.json", code, bool(rehearse))]
    for name in names:
        if name not in todo:
            print(f"{name}: finished before with this code, left out", file=sys.stderr)
    if not todo:
        return 0
    for module in PRELOADED if rehearse == "cpu" else ():
        import_module(module)
    machine = facts(rehearse)
    machine["commit"] = commit or machine["commit"]
    out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for name in todo:
        part = replace(PARTS[name], seconds=PARTS[name].seconds * (5 if rehearse else 1))  # CI's machine has others too
        print(f"{name} (up to {part.seconds:.0f} s)", file=sys.stderr, flush=True)
        outcome = run_part(name, part, rehearse)
        outcome |= {**machine, "code": code, "rehearsal": bool(rehearse)}
        write_json(out / f"{name}.json", outcome)
        wrong += not outcome["complete"]
        print(f"  {len(outcome['detail'])} measurements in {outcome['seconds']:.1f} s"
              + (f"; {outcome['stopped']}" if outcome["stopped"] else ""), file=sys.stderr, flush=True)  # fmt: skip
    return int(wrong > 0)


def run_part(name: str, part: Part, rehearse: str) -> dict[str, Any]:
    """The outcome of a part: what it measured, and why it ended early where it did."""
    begin, found, stopped = time.perf_counter(), {}, ""
    for measurement, row in _in_process(part.where, rehearse, part.seconds):
        if measurement:
            found[measurement] = row
        else:
            stopped = row["stopped"]
    shown = _named(part.figures)(found)
    return {
        "name": f"gpu/{name}", "command": f"python bench/gpu.py --parts {name}", "n": _calls(found),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begin,
        "complete": not stopped, "stopped": stopped, "figures": shown, "targets": _targets(part), "detail": found,
    }  # fmt: skip


def facts(rehearse: str) -> dict[str, Any]:
    """Device, driver, versions and commit, asked for in a process of its own so that this one stays off the GPU."""
    from burnish.core.errors import BurnishError

    for measurement, row in _in_process("bench.gpu:describe", rehearse, 60.0):
        if measurement == "machine":
            return row
    raise BurnishError("no CUDA device that works", "an NVIDIA GPU", "python bench/gpu.py --rehearse")


def describe(setting: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pseudo-part of `facts`; yields nothing where there is no GPU."""
    import subprocess

    import torch

    from burnish.core.provenance import commit, machine

    if setting.gpu and not torch.cuda.is_available():
        return
    versions = machine(setting.device)
    found: dict[str, Any] = {"device": versions.pop("device"), "versions": versions, "commit": commit()}
    if setting.gpu:
        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
            found["driver"], _, found["memory"] = done.stdout.strip().splitlines()[0].partition(", ")
        except (OSError, IndexError, subprocess.TimeoutExpired):
            found["driver"] = ""
        found["cuda"] = torch.version.cuda
    yield "machine", found


def is_finished(path: Path, code: str, rehearse: bool) -> bool:
    """Whether a part was measured to its end with this very code, not in a rehearsal (or in one, where this is one)."""
    if not path.is_file():
        return False
    from burnish.core.errors import BurnishError
    from burnish.core.reading import read_object

    try:
        found = read_object(path)
    except BurnishError:
        return False
    return bool(found.get("complete")) and found.get("code") == code and found.get("rehearsal") is rehearse


def code_hash() -> str:
    """Changes with the source of burnish, bench and workshop; machines that get a copy have no git."""
    digest = sha256()
    for path in sorted(p for folder in ("src", "bench", "workshop") for p in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _in_process(where: str, rehearse: str, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the generator `where` yields in a process of its own; ("", {"stopped": why}) where it did not end well."""
    context = get_context("fork" if rehearse == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, where, rehearse))
    end = time.monotonic() + seconds
    process.start()
    sender.close()
    why = ""
    try:
        while True:
            if not receiver.poll(max(0.0, end - time.monotonic())):
                why = f"stopped after {seconds:g} s"
                break
            message = json.loads(receiver.recv_bytes())
            if message is None:
                break
            yield message[0], message[1]
    except EOFError:
        process.join(5)
        why = f"its process ended with status {process.exitcode}"
    finally:
        _end(process, 10.0 if not why else 0.5)
    if why:
        yield "", {"stopped": why}


def _end(process: Any, patience: float) -> None:
    """End a part, and with it what it has started (simulators, say): it leads a process group of its own."""
    process.join(patience)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
    process.join()


def _child(sender: Connection, where: str, rehearse: str) -> None:
    import torch

    from bench.gpu_meter import Setting

    os.setsid()
    if rehearse == "cpu":
        torch.set_num_threads(1)  # tiny sizes are fastest so
    for measurement in _named(where)(Setting(rehearse or "cuda", bool(rehearse))):
        sender.send_bytes(json.dumps(measurement).encode())
    sender.send_bytes(b"null")


def _named(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def _targets(part: Part) -> dict[str, str]:
    return getattr(import_module(part.where.partition(":")[0]), "TARGETS", {})


def _calls(found: dict[str, Any]) -> int:
    """Timed calls (or episodes) behind the figures."""
    return sum(row["n"] for row in found.values() if isinstance(row.get("n"), int))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
