"""`python -m bench merge`: our merge against mergekit's and a plain file copy, on a synthetic checkpoint."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError

WEIGHT = 1.1
_WIDTH, _INNER, _KEYS, _WORDS = 2048, 5632, 256, 32000
_LAYER = {
    "self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.k_proj": (_KEYS, _WIDTH), "self_attn.v_proj": (_KEYS, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH), "mlp.gate_proj": (_INNER, _WIDTH), "mlp.up_proj": (_INNER, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INNER), "input_layernorm": (_WIDTH,), "post_attention_layernorm": (_WIDTH,),
}  # fmt: skip
SETTINGS = {"default": [], "small shards, asynchronous": ["--out-shard-size", "250M", "--async-write"]}
"""mergekit's settings; the faster one counts."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Base + 1.1 x (tuned - base) in bfloat16, from the same two checkpoints, in turns, all inputs in the page cache.

    Figures:
        time_over_mergekit: median wall time of the whole command over that of `mergekit-pytorch` at its faster setting.
        throughput_over_copy: bytes read and written per second over those of copying the base, both forced to disk.
        peak_rss_gb: largest resident set of our process.
        memory_flat: whether a checkpoint of a quarter of the size takes the same memory within 10 %.
        every_element_exact: whether each element equals float64 arithmetic rounded once.
        agrees_with_mergekit: whether mergekit's result differs by no more than the rounding of its bfloat16 arithmetic.
    """
    from burnish.core.provenance import machine

    layers, repeats = (2, 1) if args.quick else (43, 5)
    python = find_peer(args.mergekit)
    versions = machine()
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as temporary:
        folder = Path(temporary)
        quarter = _ours(make_pair(folder / "small", max(1, layers // 4)), folder / "small-out")
        for name in ("small", "small-out"):
            shutil.rmtree(folder / name)
        pair = make_pair(folder / "full", layers)
        size = (pair[0] / "model.safetensors").stat().st_size
        runs = _in_turns(pair, folder, python, repeats)
        exact = compare(pair, folder / "ours", folder / "mergekit" if python else None)
    seconds = {name: statistics.median(r["wall"] for r in found) for name, found in runs.items()}
    peers = [name for name, found in runs.items() if name.startswith("mergekit") and len(found) == repeats]
    best = min(peers, key=seconds.get, default="")
    rss = max(r["rss"] for r in runs["ours"])
    copied, moved = 2 * size / seconds["copy"], 3 * size / seconds["ours"]
    return {
        "name": "merge", "device": versions.pop("device"), "n": repeats,
        "versions": versions | ({"mergekit": peer_version(python)} if python else {}),
        "figures": {
            "time_over_mergekit": seconds["ours"] / seconds[best] if best else None,
            "throughput_over_copy": moved / copied,
            "peak_rss_gb": rss / 1e9,
            "memory_flat": bool(rss <= 1.1 * quarter["rss"]),
            "every_element_exact": exact["ours_wrong"] == 0,
            "agrees_with_mergekit": exact["mergekit_beyond_rounding"] == 0 if python else None,
        },
        "detail": {
            "checkpoint_gb": size / 1e9, "tensors": 9 * layers + 3, "weight": WEIGHT, "seconds": seconds,
            "all_runs": runs, "mergekit_setting": best or "mergekit is absent: give --mergekit PYTHON",
            "gb_per_second": moved / 1e9, "copy_gb_per_second": copied / 1e9, "quarter_rss_gb": quarter["rss"] / 1e9,
            "elements": exact,
        },
    }  # fmt: skip


def find_peer(python: str) -> str:
    """The interpreter that has mergekit, "" when none was given; BurnishError when it has none."""
    if not python:
        print("bench merge: no --mergekit PYTHON, so there is no peer in this run", file=sys.stderr)
        return ""
    if not (Path(python).parent / "mergekit-pytorch").is_file():
        fix = "uv venv ENV; uv pip install -p ENV/bin/python mergekit; --mergekit ENV/bin/python"
        raise BurnishError(f"there is no mergekit beside {python}", "an environment with mergekit", fix)
    return python


def peer_version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def make_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """A Llama-shaped bfloat16 checkpoint and a tuned one: normal weights of spread 0.02, changes of 0.0005."""
    from tqdm import tqdm

    from burnish.weights.tensorfile import TensorInfo, make_header

    shapes = {"model.embed_tokens.weight": (_WORDS, _WIDTH)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LAYER.items()}
    shapes |= {"model.norm.weight": (_WIDTH,), "lm_head.weight": (_WORDS, _WIDTH)}
    header, _ = make_header({name: TensorInfo("BF16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    base, tuned = folder / "base", folder / "tuned"
    for path in (base, tuned):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    draws = np.random.default_rng(0)
    with open(base / "model.safetensors", "wb") as one, open(tuned / "model.safetensors", "wb") as two:
        one.write(header)
        two.write(header)
        for shape in tqdm(shapes.values(), desc="making checkpoints", file=sys.stderr):
            for rows in np.array_split(np.arange(shape[0]), max(1, int(np.prod(shape)) >> 22)):
                block = draws.standard_normal((rows.size, *shape[1:]), np.float32) * np.float32(0.02)
                one.write(_bf16(block))
                block += draws.standard_normal(block.shape, np.float32) * np.float32(5e-4)
                two.write(_bf16(block))
    return base, tuned


def _bf16(values: np.ndarray) -> bytes:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


_LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps({"wall": time.perf_counter() - begin, "cpu": usage.ru_utime + usage.ru_stime,
                  "rss": usage.ru_maxrss * 1024, "status": os.waitstatus_to_exitcode(status)}))
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak resident bytes of a command.

    It is started from a small process of its own: Linux counts the memory of the process that forks as the child's.
    """
    done = subprocess.run([sys.executable, "-S", "-c", _LAUNCHER, *command], capture_output=True, text=True)
    found = json.loads(done.stdout)
    if found.pop("status"):
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise BurnishError(f"{Path(command[0]).name} failed ({lines[-1]})")
    return found


def _ours(pair: tuple[Path, Path], output: Path) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    merge = [sys.executable, "-m", "burnish.cli.main", "weights", "merge", str(pair[0])]
    return timed([*merge, "--tuned", f"{pair[1]}={WEIGHT}", "-o", str(output)])


def _copy(source: Path, target: Path) -> dict[str, float]:
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    found = {"wall": time.perf_counter() - begin}
    target.unlink()  # or it takes the room of the others' inputs in the page cache
    return found


def _peer(pair: tuple[Path, Path], folder: Path, python: str, options: list[str]) -> dict[str, float]:
    config, output = folder / "mergekit.yaml", folder / "mergekit"
    base, tuned = (str(path / "model.safetensors") for path in pair)
    models = [{"model": tuned, "parameters": {"weight": WEIGHT}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "parameters": {"normalize": False},
              "dtype": "bfloat16", "models": models}  # fmt: skip
    config.write_text(json.dumps(recipe))  # JSON is YAML too
    shutil.rmtree(output, ignore_errors=True)
    found = timed([str(Path(python).parent / "mergekit-pytorch"), str(config), str(output), *options])
    begin = time.perf_counter()
    for file in output.glob("*.safetensors"):  # ours and the copy wait for the disk too
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return found | {"wall": found["wall"] + time.perf_counter() - begin}


def _in_turns(pair: tuple[Path, Path], folder: Path, python: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """`repeats` rounds of every contestant; of mergekit's settings only the faster one goes on after the first."""
    from tqdm import tqdm

    source = pair[0] / "model.safetensors"
    contestants: dict[str, Callable[[], dict[str, float]]] = {
        "copy": lambda: _copy(source, folder / "copy"),
        "ours": lambda: _ours(pair, folder / "ours"),
    }
    for name, options in SETTINGS.items() if python else ():
        contestants[f"mergekit, {name}"] = lambda options=options: _peer(pair, folder, python, options)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    bar = tqdm(range(repeats), desc="in turns", file=sys.stderr)
    for _ in bar:
        for name, contestant in contestants.items():
            for path in pair:
                _read(path / "model.safetensors")
            runs[name].append(contestant())
            bar.write(f"{name}: {runs[name][-1]['wall']:.1f} s", file=sys.stderr)
        peers = sorted((n for n in contestants if n.startswith("mergekit")), key=lambda n: runs[n][0]["wall"])
        for slower in peers[1:]:
            del contestants[slower]
    return runs


def _read(path: Path) -> None:
    """Bring a file into the page cache."""
    buffer = bytearray(1 << 22)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def compare(pair: tuple[Path, Path], ours: Path, mergekit: Path | None) -> dict[str, Any]:
    """Every element against float64 arithmetic rounded once, ours and mergekit's."""
    from burnish.weights.rounding import narrowed, widened
    from burnish.weights.sources import Checkpoint
    from burnish.weights.tensorfile import pieces

    base, tuned, mine = (Checkpoint(path) for path in (*pair, ours))
    theirs = Checkpoint(mergekit) if mergekit is not None else None

    def count(name: str, start: int, stop: int) -> tuple[int, int, int, int]:
        b, t = (widened(c.read(name, start, stop), "BF16") for c in (base, tuned))
        exact = narrowed(b + WEIGHT * (t - b), "BF16")
        wrong, other, beyond = int((exact != mine.read(name, start, stop)).sum()), 0, 0
        if theirs is not None:
            got = theirs.read(name, start, stop)
            differs = exact != got
            change = abs(WEIGHT * (t[differs] - b[differs]))
            got, exact = widened(got[differs], "BF16"), widened(exact[differs], "BF16")
            # The sum is rounded once, and so is the exact result: half a step each. Weight, difference and product
            # are rounded to a relative 2^-8 each (bfloat16 has eight bits, the hidden one counted).
            allowed = _half_step(got) + _half_step(exact) + 3.02 * 2.0**-8 * change
            other, beyond = int(differs.sum()), int((abs(got - exact) > allowed).sum())
        return stop - start, wrong, other, beyond

    jobs = [(name, *piece) for name, info in base.tensors.items() for piece in pieces(info.size)]
    with ThreadPoolExecutor(2) as pool:
        total = np.sum(list(pool.map(lambda job: count(*job), jobs)), axis=0).tolist()
    names = ("elements", "ours_wrong", "mergekit_not_nearest", "mergekit_beyond_rounding")
    return dict(zip(names, total, strict=True))


def _half_step(values: np.ndarray) -> np.ndarray:
    """Half the distance between bfloat16 numbers at each of `values`: the most that rounding to them can change."""
    return np.ldexp(1.0, np.frexp(values)[1] - 9)
