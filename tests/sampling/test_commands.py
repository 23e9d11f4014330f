"""The commands on a tiny policy, and the figures of the bench."""

import json

import pytest
import torch

from bench import decode as bench
from burnish.cli.main import main
from burnish.sampling.timing import left_to_right
from workshop.tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("decode") / "p"
    return make_tiny("burnish_discrete", target, cameras=("top",), overrides={"block_size": 7})


def test_decode_verify_and_picture(folder, tmp_path, capsys):
    out = tmp_path / "figures.json"
    picture = tmp_path / "blocks.png"
    argv = [
        "policy",
        "decode",
        str(folder),
        "--decoder",
        "pipelined",
        "--decoder",
        "prompt_cached",
        "--option",
        "threshold=1.01",
    ]
    assert main([*argv, "--count", "2", "--repeats", "1", "--output", str(out), "--figure", str(picture)]) == 0
    found = json.loads(out.read_text())["decoders"]
    assert found["pipelined"]["passes"] == 10 and found["prompt_cached"]["passes"] == 12
    assert picture.stat().st_size > 5000 and "prompt_cached" in capsys.readouterr().out
    assert main(["policy", "verify", "decode", str(folder), "--count", "2", "--double", "--json"]) == 0
    checks = {check["name"]: check["ok"] for check in json.loads(capsys.readouterr().out)}
    assert checks.pop("shift") is None and set(checks.values()) == {True}


def test_mistakes_are_one_line(folder, capsys):
    assert main(["policy", "decode", str(folder), "--decoder", "autoregressive"]) == 2
    assert main(["policy", "decode", str(folder), "--decoder", "pipelined", "--option", "block=9"]) == 2
    assert main(["policy", "decode", str(folder), "--option", "threshold"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "blocks of 9 do not divide" in lines[1]


def test_left_to_right():
    assert left_to_right(torch.tensor([1, 1, 2, 2, 3, 3]), 2) == pytest.approx(1)
    assert left_to_right(torch.tensor([3, 3, 2, 2, 1, 1]), 2) == pytest.approx(-1)
    assert left_to_right(torch.tensor([1, 1, 1, 1]), 2) == 0


def test_bench_measures_and_names_its_figures():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1}  # fmt: skip
    found = bench.measure(2, 4, size, "cpu", torch.float32, 1)
    assert found["tokens_equal"] and found["decoders"]["bidirectional"]["rows"] >= 8 * (bench.PROMPT + 8)
    times = {"bidirectional": 60, "prompt_cached": 20, "prompt_cached_equal": 8, "auto": 10, "pipelined": 12,
             "sequential": 11, "paper": 9, "one_pass": 5}  # fmt: skip
    rows = {name: {"ms": ms, "first_step_ms": ms / 2, "auto_over": 10 / ms} for name, ms in times.items()}
    lengths = {length: {"decoders": rows, "tokens_equal": True} for length in (7, 56, 640)}
    figures = bench._figures(lengths)
    assert figures == {
        "bidirectional_over_ours": 6, "bidirectional_over_pipelined": 5, "bidirectional_over_one_pass": 12,
        "prompt_cached_over_ours": 2, "long_prompt_cached_over_ours": 2, "prompt_cached_equal_passes_over_ours": 0.8,
        "one_pass_over_ours": 0.5,
        "first_action_speedup": 6, "auto_worst_over_best": pytest.approx(10 / 9), "tokens_equal": True,
    }  # fmt: skip
