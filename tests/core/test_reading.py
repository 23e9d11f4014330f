"""Reading what others wrote: each kind of bad file ends in one line."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.reading import (
    inside,
    parse_json,
    parse_yaml,
    read_json,
    read_lines,
    read_object,
    read_text,
    regular_file,
)


def refused(call, *arguments, **more) -> str:
    with pytest.raises(BurnishError) as error:
        call(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to("gone")
    assert "is a pipe" in refused(read_text, tmp_path / "pipe")  # and does not wait for somebody to write into it
    assert "is a folder" in refused(read_text, tmp_path / "folder")
    assert "is a device" in refused(read_text, "/dev/zero")
    assert "no file at" in refused(read_text, tmp_path / "absent")
    assert "a link to nothing" in refused(read_text, tmp_path / "nowhere")
    assert refused(read_text, tmp_path / ("x" * 300))
    assert refused(read_text, tmp_path / "a\0b")


def test_a_path_of_elsewhere_and_a_book_for_a_name_are_one_line(tmp_path):
    """As `folder / name` is where a stranger's name is absolute."""
    assert "leads out of" in refused(regular_file, tmp_path / "/etc/passwd", tmp_path)
    assert len(str(BurnishError("x" * 10**6, "a name"))) < 2100


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "big", "wb") as file:
        file.truncate(10**12)
    assert "at most" in refused(read_text, tmp_path / "big")


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refused(read_text, tmp_path / "model.safetensors")


def test_encodings(tmp_path):
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf{}")
    assert read_object(tmp_path / "bom") == {}
    (tmp_path / "wide").write_text("{}", encoding="utf-16")
    assert "iconv" in refused(read_text, tmp_path / "wide")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    assert "no UTF-8" in refused(read_text, tmp_path / "latin")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "~/x", "a\0b"])
def test_names_that_lead_out(tmp_path, name):
    assert "leads out" in refused(inside, tmp_path, name)


def test_links(tmp_path):
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "2").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    (snapshot / "other.json").symlink_to("../../secret")
    assert read_json(snapshot / "config.json", snapshot) == {}
    assert "outside" in refused(read_json, snapshot / "other.json", snapshot)


@pytest.mark.parametrize("text, word", [
    ("[" * 100_000, "deep"), ('{"a":' * 100 + "1" + "}" * 100, "deep"), ('{"a": 1, "a": 2}', "twice"),
    ("{", "not JSON"), ("9" * 5000, "not JSON"),
])  # fmt: skip
def test_json(text, word):
    assert word in refused(parse_json, text, "it")


NINE = [f"{new}: &{new} [{','.join(['*' + old] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)]
LAUGHS = "\n".join(["a: &a [x]", *NINE])


WIDE = "{" + ", ".join(f"{i}: 0" for i in range(500)) + "}"
CHAIN = "\n".join(["a0: &a0 {x: 0}", *(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 0}}" for i in range(1, 700))])


@pytest.mark.parametrize("text, word", [
    ("a: 1\na: 2", "twice"), ("&a [*a]", "deep"), ("[" * 50_000, "deep"), (LAUGHS, "repeats"),
    ("!!python/object/apply:os.system [x]", "YAML"), ("{" + "x: 1, " * 2000 + "}", "twice"),
    (f"a: &a {WIDE}\nb: {{<<: [{', '.join(['*a'] * 500)}]}}", "of no mapping"), (CHAIN, "repeats too much by '<<'"),
    (f"a: &a {WIDE}\nb: {{{', '.join(['<<: *a'] * 500)}}}", "'<<' twice"), ("a: {<<: 3}", "of no mapping"),
    ("episodes: [10:50]", "10:50 is a number in base 8 or 60"), ("episodes: [000010]", "000010 is"),
    ("a: 1:30.5", "1:30.5 is"), ("a: -012", "-012 is"), ("10:50: x", "10:50 is"),
], ids=lambda text: text[:20])  # fmt: skip
def test_yaml(text, word):
    assert word in refused(parse_yaml, text, "it")


def test_numbers_and_merged_mappings_of_yaml_are_what_they_look_like():
    """10:50 alone would be episode 650, and 010 the eighth."""
    text = "{a: [0, -0, 10, 0.5, 1e3, 1_000, 0x10, 100, 1.010, 009], b: ['010', '10:50', a:b, 2024-1], c: 0:50}"
    assert parse_yaml(text, "it") == {
        "a": [0, 0, 10, 0.5, "1e3", 1000, 16, 100, 1.01, "009"], "b": ["010", "10:50", "a:b", "2024-1"], "c": "0:50",
    }  # fmt: skip
    merged = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, z: 4}", "it")
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 3, "z": 4}}


def test_lines_end_at_line_feeds_alone(tmp_path):
    (tmp_path / "rows").write_text('{"task": "a\u2028b"}\n\n{"task": 1}\n', encoding="utf-8")
    assert list(read_lines(tmp_path / "rows")) == [(1, {"task": "a\u2028b"}), (3, {"task": 1})]
    (tmp_path / "list").write_text("{}\n[1]\n")
    assert "list:2 holds a list" in refused(list, read_lines(tmp_path / "list"))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_whatever_json_writes_is_read(value):
    assert parse_json(json.dumps(value), "it") == value
