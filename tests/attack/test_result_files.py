"""Hostile and broken result files, evaluation folders, run folders and flags of `eval`: one line, and nothing lost."""

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.evaluate.results import read_results

GOOD = '{"task": "t", "seed": 0, "success": true}\n'


def line(**changes) -> str:
    row = {"task": "t", "initial_state": 0, "success": True} | changes
    return json.dumps({key: value for key, value in row.items() if value != "absent"}) + "\n"


def per_task(metrics) -> str:
    return json.dumps({"per_task": [{"task_group": "g", "task_id": 0, "metrics": metrics}]}, indent=1)


FILES = {
    "empty": ("", "holds no episode"),
    "blank lines": ("\n \n", "holds no episode"),
    "no json": ("nonsense\n", ":1 is not JSON"),
    "csv": ("task,seed,success\nt,0,1\n", ":1 is not JSON"),
    "utf-16": ("\ufeff" + GOOD, "UTF-16", "utf-16-le"),
    "latin-1": (line(task="ø").replace("\\u00f8", "ø"), "no UTF-8 text", "latin-1"),
    "binary": ("\x00\x01" + GOOD, ":1 is not JSON"),
    "a key twice": ('{"task": "t", "seed": 0, "seed": 1, "success": true}\n', "says 'seed' twice"),
    "an episode twice": (GOOD + GOOD, "more than once"),
    "an episode twice in two seeds each": (line(seed=1) * 2 + line(seed=2), "more than once"),
    "deep": ("[" * 100_000, "nested too deep"),
    "deep in a column": (GOOD.replace("true", "[" * 90 + "]" * 90), "nested too deep"),
    "numbers": ("1\n2\n", ":1 holds 1"),
    "null": ("null\n", ":1 holds None"),
    "second line a list": (GOOD + "[]\n", ":2 holds []"),
    "list of numbers": ("[1, 2]", "no list of JSON objects"),
    "no success": (line(success="absent"), "lacks success"),
    "success null": (line(success=None), "lacks success"),
    "success text": (line(success="yes"), "success is 'yes'"),
    "success 2": (line(success=2), "success is 2"),
    "success half": (line(success=0.5), "success is 0.5"),
    "success nan": (line(success=float("nan")), "success is nan"),
    "success list": (line(success=[True]), "success is [True]"),
    "success huge": (line(success=10**400), "success is 1000"),
    "state text": (line(initial_state="a"), "initial_state is 'a'"),
    "state half": (line(initial_state=1.5), "initial_state is 1.5"),
    "state true": (line(initial_state=True), "initial_state is True"),
    "state infinite": (line(initial_state=float("inf")), "initial_state is inf"),
    "state huge": (line(initial_state=10**30), "initial_state is 1000"),
    "state absent": (line(initial_state="absent"), "lacks initial_state, trial or seed"),
    "seed text": (line(seed="x"), "seed is 'x'"),
    "steps text": (line(steps="12"), "steps is '12'"),
    "steps nan": (line(steps=float("nan")), "steps is nan"),
    "steps negative": (line(steps=-5), "steps is -5"),
    "steps list": (line(steps=[1]), "steps is [1]"),
    "latency text": (line(latency_ms="12 ms"), "latency_ms is '12 ms'"),
    "latency texts": (line(latency_ms=["12"]), "latency_ms is ['12']"),
    "latency negative": (line(latency_ms=[-1]), "latency_ms is [-1]"),
    "latency nan": (line(latency_ms=[1, float("nan")]), "latency_ms is [1, nan]"),
    "latency object": (line(latency_ms={"p50": 1}), "latency_ms is {"),
    "task list": (line(task=["t"]), "task is ['t']"),
    "task true": (line(task=True), "task is True"),
    "variant number": (line(variant=3), "variant is 3"),
    "other success": (line(other_success="no"), "other_success is 'no'"),
    "task_id": (line(task="absent", task_id=0), "has 'task_id'"),
    "task_description": (line(task="absent", task_description="x"), "has 'task_description'"),
    "episode": (line(initial_state="absent", episode=0), "has 'episode'"),
    "episode beside a seed": (2 * line(initial_state="absent", seed=7, episode=0), "'episode'"),
    "unknown object": ('{\n"score": 3\n}', "of no form that is known"),
    "per_task null": ('{\n"per_task": null\n}', "holds no episode"),
    "per_task text": ('{\n"per_task": "x"\n}', "no list of JSON objects"),
    "per_task of numbers": ('{\n"per_task": [3]\n}', "no list of JSON objects"),
    "metrics null": (per_task(None), "no list of successes"),
    "successes null": (per_task({"successes": None}), "no list of successes"),
    "successes of text": (per_task({"successes": ["yes"]}), "success is 'yes'"),
    "successes with null": (per_task({"successes": [None]}), "lacks success"),
    "tasks text": ('{\n"tasks": "x"\n}', "no list of JSON objects"),
    "episodes null": ('{\n"tasks": [{"task": "t", "episodes": null}]\n}', "no list of JSON objects"),
    "metrics of vla-eval": ('{\n"tasks": [{"task": "t", "episodes": [{"episode_id": 0}]}]\n}', "lacks success"),
    "a task of vla-eval twice": (
        json.dumps({"tasks": 2 * [{"task": "t", "episodes": [{"episode_id": 0, "metrics": {"success": 1}}]}]}),
        "more than once",
    ),
    "cut json": (per_task({"successes": [True]})[:-9], "is not JSON"),
    "log without an episode": ("Task: t\nSuccess: True\n", "lacks initial_state"),
    "log with another word": ("Task: t\nStarting episode 1...\nSuccess: maybe\n", "success is 'maybe'"),
    "cut log": (
        "Task: t\nStarting episode 1...\nSuccess: True\n# episodes completed so far: 7\n", "tells of 7 episodes",
    ),
    "many seeds": ("".join(line(seed=seed) for seed in range(200)), "200 runs of the same initial states"),
    "many tasks": ("".join(line(task=f"t{i}") for i in range(3000)), "3000 tasks"),
    "lfs pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_compared(name, tmp_path, refused):
    text, needle, *encoding = FILES[name]
    file, good = tmp_path / "results", tmp_path / "good.jsonl"
    file.write_bytes(text.encode(*encoding))
    good.write_text(GOOD)
    refused(["compare", file, file if name in ("many seeds", "many tasks") else good], needle)


@pytest.mark.parametrize("make, needle", [
    (lambda path: os.mkfifo(path), "is a pipe"), (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    (lambda path: path.symlink_to("nowhere"), "a link to nothing"), (lambda path: path.mkdir(), "no results at"),
    (lambda path: None, "no file at"), (lambda path: path.symlink_to(path), "cannot be read"),
])  # fmt: skip
def test_something_else_than_a_file(make, needle, tmp_path, refused):
    make(tmp_path / "r.jsonl")
    refused(["compare", tmp_path / "r.jsonl", tmp_path / "r.jsonl"], needle)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, refused, monkeypatch):
    (tmp_path / "r.jsonl").write_text(GOOD)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no file" not in refused(["compare", tmp_path / "r.jsonl", tmp_path / "r.jsonl"], "may not be read", "chmod")


@pytest.mark.parametrize("flags, needle", [
    (["--task-regex", "("], "regular expression"), (["--task-regex", "zzz"], "matches 'zzz'"),
    (["--seed", "-1"], "--seed is -1"),
])  # fmt: skip
def test_flags_of_compare(flags, needle, tmp_path, refused):
    (tmp_path / "r.jsonl").write_text(GOOD)
    refused(["compare", tmp_path / "r.jsonl", tmp_path / "r.jsonl", *flags], needle)


def test_a_task_pattern_has_an_end(tmp_path, refused):
    (tmp_path / "r.jsonl").write_text(line(task="a" * 200))
    refused(["compare", tmp_path / "r.jsonl", tmp_path / "r.jsonl", "--task-regex", "(a|a|aa)+$b"], "takes too long")


def test_a_name_cannot_steer_the_terminal(tmp_path, accepted):
    text = line(task="a\x1b[2J\nb") + line(task="c")
    (tmp_path / "r.jsonl").write_text(text)
    shown = accepted(["compare", tmp_path / "r.jsonl", tmp_path / "r.jsonl"], "a?[2J?b")
    assert "\x1b" not in shown


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["task", "seed", "initial_state", "trial", "success", "steps", "latency_ms", "variant", "per_task", "tasks",
        "per_episode", "metrics", "episodes", "task_id", "episode", "other_success"]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6) | JSON, max_size=4),
       whole=st.booleans())  # fmt: skip
def test_any_json_is_read_or_refused(rows, whole, tmp_path):
    file = tmp_path / "r"
    file.write_text(json.dumps(rows, indent=1) if whole else "".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert read_results(file)
    except BurnishError as error:
        assert "\n" not in str(error)


EVAL = ["eval", "expert", "tabletop:reach", "--episodes", "1"]


@pytest.mark.parametrize("flags, needle", [
    (["--max-steps", "-1"], "max_steps is -1"), (["--episodes", "0"], "episodes is 0"),
    (["--episodes", "1000000000"], "episodes is 1000000000"), (["--workers", "-1"], "workers is -1"),
    (["--workers", "1000000"], "workers is 1000000"), (["--first-state", "-5"], "first_state is -5"),
    (["--max-steps", "10000000000"], "max_steps is 10000000000"), (["--image-size", "0"], "images of 0x0"),
    (["--image-size", "-8"], "images of -8x-8"), (["--image-size", "1000000"], "images of 1000000x1000000"),
    (["--instruction-swap"], "--instruction-swap with expert"), (["--cameras", "front"], "--cameras with expert"),
    (["--n-action-steps", "3"], "--n-action-steps with expert"), (["--device", "cpu"], "--device with expert"),
    (["--env", "tabletop:nothing"], "unknown tabletop family"), (["--env", "moon:base"], "moon"),
    (["--env", ""], "neither of an environment"), (["--env", "tabletop:lift+fog"], "+fog"),
])  # fmt: skip
def test_flags_of_eval(flags, needle, tmp_path, refused):
    words = EVAL if "--env" not in flags else [*EVAL[:2], *EVAL[3:]]
    refused([*words, "--output", tmp_path / "out", *flags], needle)
    assert not (tmp_path / "out").exists()


SETTINGS = {"env": "tabletop:reach", "weights": "expert", "seed": 0}


@pytest.mark.parametrize("files, needle", [
    ({"summary.json": "mine"}, "would overwrite"),
    ({"episodes.jsonl": "mine\ncut"}, "would overwrite"),
    ({"meta/info.json": "{}", "data/x.parquet": ""}, "would overwrite"),
    ({"settings.json": '{"theme": 1}', "episodes.jsonl": "mine"}, "would overwrite"),
    ({".burnish.json": '{"kind": "training run"}', "metrics.jsonl": ""}, 'burnish made as "training run"'),
    ({".burnish.json": "{", "x": ""}, "is not JSON"),
    ({"settings.json": "{", "episodes.jsonl": GOOD}, "settings.json is not JSON"),
    ({"settings.json": "[]", "episodes.jsonl": GOOD}, "settings.json holds a list"),
])  # fmt: skip
def test_a_folder_that_is_no_evaluation_of_ours(files, needle, tmp_path, refused, untouched):
    out = tmp_path / "out"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    check = untouched(out)
    refused([*EVAL, "--output", out], needle)
    check()


def test_an_output_that_is_a_file_or_lies_below_one(tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        refused([*EVAL, "--output", tmp_path / out], "is a file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("episodes, needle", [
    ("mine\n", "is not JSON"), (GOOD + GOOD, "more than once"), (line(steps="x"), "steps is 'x'"),
])  # fmt: skip
def test_a_journal_that_cannot_go_on_is_left_as_it_is(episodes, needle, tmp_path):
    from burnish.evaluate.records import Journal

    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "episodes.jsonl").write_text(episodes + "the last line is cut")
    with pytest.raises(BurnishError, match=needle.replace("'", ".")):
        Journal(tmp_path, SETTINGS)
    assert (tmp_path / "episodes.jsonl").read_text() == episodes + "the last line is cut"


SUMMARY = {"overall": {"n": 10, "successes": 5}}
RUNS = {
    "run.json cut": ({"run.json": '{"name": "x'}, "run.json is not JSON"),
    "run.json a list": ({"run.json": []}, "run.json holds a list"),
    "stages text": ({"run.json": {"stages": "x"}}, "stages is no list"),
    "stage a number": ({"run.json": {"stages": [3]}}, "stages holds something else"),
    "minutes text": ({"run.json": {"stages": [{"name": "a", "minutes": "long"}]}}, "minutes is 'long'"),
    "minutes nan": ({"run.json": {"stages": [{"name": "a", "minutes": float("nan")}]}}, "minutes is 'nan'"),
    "versions text": ({"run.json": {"versions": "x"}}, "versions is no object"),
    "commands text": ({"run.json": {"commands": "x"}}, "commands is no list"),
    "metrics": ({"metrics.jsonl": '{"step": 1}\nx\n{"step": 2}\n'}, "metrics.jsonl:2 is not JSON"),
    "metrics a number": ({"metrics.jsonl": "1\n"}, "metrics.jsonl:1 holds 1"),
    "summary cut": ({"eval/tuned/summary.json": '{"over'}, "summary.json is not JSON"),
    "summary a list": ({"eval/tuned/summary.json": [1]}, "summary.json holds a list"),
    "no counts": ({"eval/tuned/summary.json": {}}, "no whole numbers n and successes"),
    "true of true": ({"eval/tuned/summary.json": {"overall": {"n": True, "successes": True}}}, "no whole numbers"),
    "11 of 10": ({"eval/tuned/summary.json": {"overall": {"n": 10, "successes": 11}}}, "11 successes of 10"),
    "0 of 0": ({"eval/tuned/summary.json": {"overall": {"n": 0, "successes": 0}}}, "0 successes of 0"),
    "huge": ({"eval/tuned/summary.json": {"overall": {"n": 10**400, "successes": 1}}}, "no whole numbers"),
    "per_task list": ({"eval/tuned/summary.json": {**SUMMARY, "per_task": [1]}}, "per_task is no object"),
    "per_task null": ({"eval/tuned/summary.json": {**SUMMARY, "per_task": {"t": None}}}, "no whole numbers"),
    "latency text": ({"eval/tuned/summary.json": {**SUMMARY, "latency_ms": {"p50": "fast"}}}, "p50 is 'fast'"),
    "latency list": ({"eval/tuned/summary.json": {**SUMMARY, "latency_ms": [3]}}, "latency_ms is no object"),
    "videos text": ({"eval/tuned/summary.json": {**SUMMARY, "videos": "x"}}, "videos is no list"),
    "videos of text": ({"eval/tuned/summary.json": {**SUMMARY, "videos": ["x"]}}, "videos holds something else"),
    "retention text": ({"retention.json": {"base": "x"}}, "base is no object"),
    "retention without counts": ({"retention.json": {"tuned": {"loss": 1}}}, "no whole numbers"),
    "retention kinds": ({"retention.json": {"tuned": {"accuracy": {"n": 1, "successes": 1}, "by_kind": [1]}}},
                        "by_kind is no object"),
    "retention comparison": ({"retention.json": {"comparison": {"low": "x"}}}, "low is 'x'"),
    "recipe": ({"run.json": {"name": "x"}, "recipe.yaml": b"\xff\xfe\x00"}, "UTF-16"),
    "nothing": ({"notes.txt": "x"}, "nothing to report"),
    "another page": ({"run.json": {"name": "x"}, "report.html": "<p>mine"}, "is another page"),
}  # fmt: skip


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_reported(name, tmp_path, refused, untouched):
    files, needle = RUNS[name]
    check = untouched(write(tmp_path / "run", files))
    refused(["report", "page", tmp_path / "run"], needle)
    check()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "recipe.yaml", "retention.json"])
def test_a_link_out_of_the_run_and_a_pipe_are_refused(name, tmp_path, refused):
    (tmp_path / "secret").write_text("{}")
    run = write(tmp_path / "run", {"eval/tuned/summary.json": SUMMARY})
    (run / name).symlink_to(tmp_path / "secret")
    refused(["report", "page", run], "outside")
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(["report", "page", run], "is a pipe")


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert(1)</script>"


def test_hostile_names_are_text_on_the_page(tmp_path, accepted):
    film = {"task": EVIL, "initial_state": EVIL, "success": True, "film_strip": "a.png"}
    rate = SUMMARY["overall"]
    summary = {"overall": rate, "per_task": {EVIL: rate, "b": rate}, "latency_ms": {"p" + EVIL: 3}, "videos": [film]}
    other = {key: value for key, value in summary.items() if key != "videos"}
    curves = "".join(json.dumps({"step": step, EVIL: step, "loss": 1.0}) + "\n" for step in range(3))
    kinds = {"accuracy": rate, "by_kind": {EVIL: rate}}
    run = write(tmp_path / EVIL.replace("/", ""), {
        "run.json": {"name": EVIL, "commit": EVIL, "hardware": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "seeds": [EVIL],
                     "stages": [{"name": EVIL, "minutes": 1}], "commands": [EVIL], "date": EVIL},
        "recipe.yaml": EVIL, "metrics.jsonl": curves, "retention.json": {"base": kinds, "tuned": kinds},
        "eval/tuned/summary.json": summary, f"eval/{EVIL.replace('/', '')}/summary.json": other,
        "eval/tuned/a.png": PIXEL,
        "eval/tuned/episodes.jsonl": json.dumps({"task": EVIL, "initial_state": EVIL, "instruction": EVIL}) + "\n",
    })  # fmt: skip
    accepted(["report", "page", run])
    page = (run / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "data:image/png" in page


@pytest.mark.parametrize("place", ["../outside.png", "absolute", "link.png", "../../../run/../outside.png"])
def test_pictures_from_outside_are_not_embedded(place, tmp_path, accepted):
    (tmp_path / "outside.png").write_bytes(PIXEL)
    place = str(tmp_path / "outside.png") if place == "absolute" else place
    film = {"task": "t", "initial_state": 0, "success": True, "film_strip": place, "video": "../../run.json"}
    run = write(tmp_path / "run", {"run.json": {}, "eval/tuned/summary.json": {**SUMMARY, "videos": [film]}})
    (run / "eval/tuned/link.png").symlink_to(tmp_path / "outside.png")
    (run / "outside.png").write_bytes(PIXEL)
    (run / "eval/outside.png").write_bytes(PIXEL)
    accepted(["report", "page", run], "left out of the page")
    assert "data:image" not in (run / "report.html").read_text()


@pytest.mark.parametrize("content", [b"", b"no picture", PIXEL[:40], PIXEL[:16] + b"\xff" * 8 + PIXEL[24:]])
def test_a_broken_picture_is_left_out(content, tmp_path, accepted):
    film = {"task": "t", "initial_state": 0, "success": True, "film_strip": "a.png", "video": "a.mp4"}
    files = {"run.json": {}, "eval/tuned/summary.json": {**SUMMARY, "videos": [film]}}
    run = write(tmp_path / "run", files | {"eval/tuned/a.png": content})
    accepted(["report", "page", run])
    assert "<img" not in (run / "report.html").read_text()
