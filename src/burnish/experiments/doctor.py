"""Whether this machine can do what burnish does, and a remedy for what is missing."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from burnish.core.errors import one_line

LITTLE = 20
"""GB of free disk below which a data set and a policy of ordinary size run into trouble."""
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light/><geom size='.1'/></worldbody></mujoco>")
renderer, data = mujoco.Renderer(model, 32, 32), mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
renderer.render()
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `ok` is False where something will fail, None for a remark; `fix` may be ""."""

    what: str
    found: str
    ok: bool | None = True
    fix: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", None: "-", False: "FAILED"}[self.ok]
        return f"{mark:<7} {self.what:<14} {self.found}" + (f"; try: {self.fix}" if self.fix else "")


def examine(folder: Path | str = ".") -> list[Finding]:
    """Look at everything; `folder` is where data sets and runs are going to lie."""
    return [*_packages(), *_disk(Path(folder)), *_gpu(), *_lerobot(), *_video(), *_rendering()]


def _packages() -> Iterator[Finding]:
    """Python, and what burnish and its extras ask for, against what is installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    about = metadata("burnish")
    wanted, found = about["Requires-Python"] or "", platform.python_version()
    fits = found in SpecifierSet(wanted)
    yield Finding("python", f"{found} ({sys.executable})", fits, "" if fits else f"an environment of Python {wanted}")
    lacking: dict[str, list[str]] = {}
    for one in map(Requirement, requires("burnish") or ()):
        try:
            found = version(one.name)
        except PackageNotFoundError:
            found = ""
        fits = bool(found) and one.specifier.contains(found, prereleases=True)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            said = (found or "missing") + (f" (wanted {one.specifier})" if one.specifier else "")
            yield Finding(one.name, said, fits, "" if fits else f"pip install '{one.name}{one.specifier}'")
        elif not fits:
            for extra in about.get_all("Provides-Extra") or ():
                if one.marker.evaluate({"extra": extra}):
                    lacking.setdefault(extra, []).append(one.name)
    for extra in lacking.keys() - {"dev", "docs"}:
        said = f"without {', '.join(lacking[extra])}"
        yield Finding(f"[{extra}]", said, None, f"pip install 'burnish[{extra}]'")


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free / 1e9
    mine = os.access(folder, os.W_OK)
    where = f"{free:.0f} GB free in {folder.resolve()}" + ("" if mine else ", which may not be written")
    fine = mine and free >= LITTLE
    yield Finding(
        "disk", where, fine or (None if mine else False), "" if fine else "a folder on a larger disk of yours"
    )


def _gpu() -> Iterator[Finding]:
    import torch

    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            yield Finding(f"gpu {index}", f"{card.name}, {card.total_memory / 1e9:.0f} GB, {half}, {built}")
    elif shutil.which("nvidia-smi"):
        fix = "nvidia-smi, and a torch for its CUDA version: https://pytorch.org/get-started/locally"
        yield Finding("gpu", f"there is a driver, and {built} sees no card", False, fix)
    else:
        yield Finding("gpu", f"none: everything runs on {os.cpu_count()} CPU cores ({built})", None)


def _lerobot() -> Iterator[Finding]:
    try:
        from burnish.policies.lerobot import known_types

        known = known_types()
        said = f"{len(known)} types, {'with' if 'burnish_discrete' in known else 'without'} burnish's plug-in"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        known, said = [], f"cannot be imported ({one_line(error, 150)})"
    fits = "burnish_discrete" in known
    yield Finding("lerobot's own", said, fits, "" if fits or not known else _again())


def _again() -> str:
    """What installs burnish once more, from the checkout or the wheel that it came from: no index has it."""
    about = json.loads(distribution("burnish").read_text("direct_url.json") or "{}")
    place = url2pathname(urlsplit(about.get("url", "")).path) or "burnish"
    editable = "-e " * bool(about.get("dir_info", {}).get("editable"))
    return f"pip install --force-reinstall --no-deps {editable}{shlex.quote(place)}"


def _video() -> Iterator[Finding]:
    import av

    lacking = [name for name in ("h264", "libx264", "libdav1d") if name not in av.codecs_available]
    said = f"PyAV {av.__version__}" + (f" without {', '.join(lacking)}" if lacking else "")
    yield Finding("video", said, not lacking, "pip install --force-reinstall av" if lacking else "")


def _rendering() -> Iterator[Finding]:
    asked, fix = os.environ.get("MUJOCO_GL", "egl"), "sudo apt-get install -y libegl1 libgl1 libosmesa6"
    works = next((kind for kind in (asked, "osmesa") if _renders(kind)), "")
    said = f"MUJOCO_GL={asked}" + ("" if works == asked else f" does not work{', osmesa does' if works else ''}")
    fix = "" if works == asked else f"export MUJOCO_GL={works}" if works else fix
    yield Finding("rendering", said, works == asked, fix)


def _renders(kind: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": kind}
    done = subprocess.run([sys.executable, "-c", _RENDER], env=environment, capture_output=True, check=False)
    return done.returncode == 0
