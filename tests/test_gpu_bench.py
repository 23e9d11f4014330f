"""bench/gpu.py: its rehearsal on the CPU goes through every part; a part that overruns leaves what it has."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_meter, gpu_parity, gpu_run, gpu_train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The parts are forks of this process, which has imported what they need."""
    out = tmp_path_factory.mktemp("gpu")
    assert gpu.main(["--rehearse", "--out", str(out)]) == 0
    return out


def test_a_rehearsal_passes_through_every_part(rehearsed):
    found = {path.stem: json.loads(path.read_text()) for path in rehearsed.glob("*.json")}
    assert set(found) == set(gpu.PARTS)
    for name, row in found.items():
        assert row["complete"] and row["rehearsal"] and not row["stopped"], name
        assert row["device"].endswith("no GPU") and row["versions"]["torch"] and len(row["code"]) == 16
        assert {m: one["failed"] for m, one in row["detail"].items() if "failed" in one} == {}
        assert row["figures"] or "skipped" in row["detail"].get("server", {}), name
    assert max(found["parity"]["figures"].values()) < 1e-2  # the CPU against itself; bf16 rounds
    assert {f"step_ratio_{m}" for m in (*gpu_train.METHODS, "distill")} <= set(found["smolvla"]["figures"])
    assert {"lora_4_step_ms", "full_4_step_ms"} <= set(found["pi05"]["figures"])
    raw = found["smolvla"]["detail"]["ours_2"]
    assert raw["tflop"] > 0 and raw["tokens"] > 0 and len(raw["ms"]) == raw["n"] and raw["median"] > 0
    assert all(f"smolvla_{tier}_float32_ms" in found["act_smolvla"]["figures"] for tier in gpu_run.TIERS)
    decoded = found["decode_7b"]["detail"]
    equal = {decoded[f"discrete-7b_28_{kind}"]["passes"] for kind in ("together", "prompt_cached_equal",
                                                                     "bidirectional_equal")}  # fmt: skip
    assert len(equal) == 1 and found["loop"]["figures"]["tabletop_exact_episodes_per_minute"] > 0


def test_finished_parts_are_left_out(rehearsed):
    before = {path: path.stat().st_mtime_ns for path in rehearsed.glob("*.json")}
    begin = time.perf_counter()
    script = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--out", str(rehearsed)]
    done = subprocess.run(script, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0 and done.stderr.count("finished before") == len(gpu.PARTS)
    assert {path: path.stat().st_mtime_ns for path in rehearsed.glob("*.json")} == before
    assert time.perf_counter() - begin < 60
    path = rehearsed / "serve.json"
    code = gpu.code_hash()
    assert gpu.is_finished(path, code, True) and not gpu.is_finished(path, code, False)
    assert not gpu.is_finished(path, "another code", True)
    changed = json.loads(path.read_text()) | {"complete": False}
    path.write_text(json.dumps(changed))
    assert not gpu.is_finished(path, code, True)


def sleepy(setting):
    yield "first", {"n": 3}
    time.sleep(60)
    yield "second", {"n": 4}


def broken(setting):
    yield "first", {"n": 1}
    sys.stderr = None  # its traceback is not the test's
    raise OSError("gone")


def names(found):
    return {"seen": sorted(found)}


def test_a_part_that_overruns_leaves_what_it_has():
    begin = time.perf_counter()
    found = gpu.run_part("x", gpu.Part(1.0, f"{__name__}:sleepy", f"{__name__}:names"), "cpu")
    assert time.perf_counter() - begin < 20
    assert found["stopped"] == "stopped after 1 s" and not found["complete"]
    assert found["figures"] == {"seen": ["first"]} and found["n"] == 3


def test_a_part_that_breaks_leaves_what_it_has():
    found = gpu.run_part("x", gpu.Part(30.0, f"{__name__}:broken", f"{__name__}:names"), "cpu")
    assert found["stopped"] == "its process ended with status 1" and found["figures"] == {"seen": ["first"]}


def test_the_parts_fit_into_eight_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 8 * 60 - 25  # imports, and what starts a GPU


def test_no_gpu_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PRELOADED", ())
    monkeypatch.setattr(gpu, "_in_process", lambda *_: iter(()))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and "no CUDA device" in told and "--rehearse" in told
    assert not (tmp_path / "out").exists()


def test_figures_stand_what_was_not_reached():
    """A part that was stopped early has few measurements; its table is made of those."""
    for figures in (gpu_parity.figures, gpu_train.smolvla_figures, gpu_train.pi05_figures, gpu_run.act_figures,
                    gpu_run.decode_figures, gpu_run.loop_figures, gpu_run.serve_figures):  # fmt: skip
        assert figures({}) == {}
    failed = {"lora_4": {"failed": "out of memory"}, "roofline": {"product_tflops": 700.0}}
    assert gpu_train.pi05_figures(failed) == {}


def test_rates_follow_from_the_measurements():
    step = {"median": 100.0, "tokens": 5000, "tflop": 40.0, "peak_gb": 9.0}
    rows = {"ours_8": step, "lerobot_8": {**step, "median": 125.0}, "align": {**step, "median": 105.0}}
    found = gpu_train.smolvla_figures({"roofline": {"product_tflops": 800.0}, **rows})
    assert found["ours_8_tokens_per_s"] == 50_000 and found["ours_8_tflops"] == 400
    assert found["ours_8_product_share"] == 0.5
    assert found["step_over_lerobot_8"] == pytest.approx(0.8) and found["step_ratio_align"] == pytest.approx(1.05)
    row = {"median": 22.0, "prefill_ms": 7.0, "passes": 6, "floor_ms": 2.0}
    shown = gpu_run.decode_figures({"m_56_together": row, "m_56_bidirectional_equal": {**row, "median": 44.0}})
    assert shown["m_56_together_pass_ms"] == 3 and shown["m_56_together_pass_over_roofline"] == 1.5
    assert shown["m_56_bidirectional_equal_over_together"] == 2


def test_the_meter_counts_products_once():
    import torch

    a, b = torch.ones(8, 16), torch.ones(16, 4, requires_grad=True)
    assert gpu_meter.flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 8 * 16 * 4)
    found = gpu_meter.timed(gpu_meter.Setting("cpu", True), lambda: a @ b, 5, 1)
    assert found["n"] == len(found["ms"]) == 5 and found["median"] <= found["p95"] <= found["p99"]
