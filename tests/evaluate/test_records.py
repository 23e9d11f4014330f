"""The journal survives kills at any byte; other tools' files are read; mistakes get one clear line."""

import fcntl
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK
from burnish.core.provenance import weights_hash
from burnish.evaluate.records import EPISODES, SETTINGS, Journal, Record
from burnish.evaluate.results import read_results

RECORDS = [Record("t:a", i, 3, i % 2 == 0, 10 + i, (1.5, 2.5), "lift the rød ball") for i in range(3)]


def test_round_trip_and_continue(tmp_path):
    with Journal(tmp_path, {"weights": "x"}) as journal:
        for record in RECORDS[:2]:
            journal.append(record)
    with Journal(tmp_path, {"weights": "x"}) as journal:
        assert journal.records == RECORDS[:2]
        journal.append(RECORDS[2])
    assert read_results(tmp_path) == RECORDS


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_file_cut_at_any_byte_loses_only_the_last_episode(tmp_path_factory, data):
    whole = "".join(r.to_line() for r in RECORDS).encode()
    cut = data.draw(st.integers(0, len(whole)))
    folder = tmp_path_factory.mktemp("cut")
    (folder / EPISODES).write_bytes(whole[:cut])
    settings = {"env": "t", "weights": "x", "seed": 3}
    (folder / SETTINGS).write_text(json.dumps(settings))
    with Journal(folder, settings) as journal:
        done = whole[:cut].count(b"\n")
        assert journal.records == RECORDS[:done]
        for record in RECORDS[done:]:
            journal.append(record)
    assert (folder / EPISODES).read_bytes() == whole


def test_other_settings_and_second_writer_are_refused(tmp_path):
    with Journal(tmp_path, {"weights": "x", "seed": 1}) as journal:
        journal.append(RECORDS[0])
    with (tmp_path / MARK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BurnishError, match="another process is writing"):
            Journal(tmp_path, {"weights": "x", "seed": 1})
    with pytest.raises(BurnishError, match=r"other weights \(weights: 'x' there, 'y' now\)"):
        Journal(tmp_path, {"weights": "y", "seed": 1})
    with Journal(tmp_path, {"weights": "x", "seed": 1}) as journal:
        assert journal.records == RECORDS[:1]


@pytest.mark.parametrize(
    ("line", "state", "success"),
    [
        ('{"task": "a", "seed": 4, "success": true}', 4, True),
        ('{"task": "a", "trial": 5, "success": 0, "extra": []}', 5, False),
        ('{"task": "a", "initial_state": 6, "seed": 1, "success": 1}', 6, True),
        ('{"task": "a", "seed": 7.0, "success": 1.0, "steps": null, "variant": null}', 7, True),
        ('\ufeff{"task": "a", "trial": 8, "success": false, "latency_ms": 12.5}', 8, False),
        ('{"task": "a", "trial": 9, "success": true, "latency_ms": null, "seed": null}', 9, True),
    ],
)
def test_reads_other_tools(tmp_path, line, state, success):
    file = tmp_path / "results.jsonl"
    file.write_text(line)
    (record,) = read_results(file)
    assert (record.task, record.initial_state, record.success, record.steps) == ("a", state, success, -1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no episode"),
        ('{"task": "a", "seed": 1}\n', ":1 lacks success"),
        ('{"task": "a", "success": 1}\n', "lacks initial_state, trial or seed"),
        ('{"task": "a", "seed": 1, "success": "yes"}\n', "success is 'yes'"),
        ('{"task": "a", "seed": "x", "success": 1}\n', "seed is 'x'"),
        ('{"seed": 1, "success": 1}\nnonsense\n', ":2 is not JSON"),
        ("[1]\n", "no list of JSON objects"),
        ('{"seed": 1, "success": 1}\n[1]\n', r":2 holds \[1\]"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    file = tmp_path / "r.jsonl"
    file.write_text(text)
    with pytest.raises(BurnishError, match=message):
        read_results(file)
    with pytest.raises(BurnishError, match="no file at"):
        read_results(tmp_path / "missing")
    with pytest.raises(BurnishError, match="no results at"):
        read_results(tmp_path)


def test_hashes_follow_contents(tmp_path):
    import torch

    module = torch.nn.Linear(2, 3)
    first = weights_hash(module)
    assert weights_hash(module) == first
    with torch.no_grad():
        module.bias[0] += 1
    assert weights_hash(module) != first
    first_folder, second_folder = tmp_path / "1", tmp_path / "2"
    for folder in (first_folder, second_folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"abc")
        (folder / "config.json").write_text(json.dumps({"vlm_model_name": str(folder), "num_steps": 3}))
    assert weights_hash(first_folder) == weights_hash(second_folder)
    (second_folder / "config.json").write_text(json.dumps({"vlm_model_name": "", "num_steps": 4}))
    assert weights_hash(first_folder) != weights_hash(second_folder)
