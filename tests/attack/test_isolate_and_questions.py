"""Anchors, question folders, imported pairs and options of isolate that are wrong: one line each, and nothing lost."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.data.question_import import import_questions
from burnish.data.questions import open_questions
from burnish.methods.isolate.anchor import Anchor
from burnish.methods.isolate.objective import Isolate

# Anchors.

ABOUT = {
    "base_hash": "abc", "layers": 2, "width": 3, "source": "q", "samples": 9, "template": "", "answers": False,
    "tokens": "apart", "gap": 0.01, "held_out": 64, "format": 2,
}  # fmt: skip


def tensors():
    parts = {"count": torch.tensor(9.0).double(), "mean": torch.zeros(3).double(), "spread": torch.ones(3).double()}
    return {f"{layer}.{group}.{part}": value.clone() for layer in range(2) for group in ("image", "text")
            for part, value in parts.items()}  # fmt: skip


def written(about=None, changed=None, header=None):
    """The bytes of an anchor with these changes."""
    found = {**tensors(), **(changed or {})}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    text = json.dumps({**ABOUT, **(about or {})}) if header is None else header
    return save(found, metadata={"about": text})


def test_the_anchor_that_is_damaged_below_is_a_whole_one(tmp_path):
    (tmp_path / "a").write_bytes(written())
    assert Anchor.load(tmp_path / "a").gap(Anchor.load(tmp_path / "a")) == 0


WHOLE = "0.image.mean"
ANCHORS = {
    "empty": b"", "text": b"not an anchor", "cut": written()[:-5], "zip": b"PK\x03\x04" + bytes(60),
    "pickle": b"\x80\x04cposix\nsystem\n", "header of 1 TB": struct.pack("<Q", 2**40) + b"{}",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "nothing about it": save(tensors()), "no JSON": written(header="{"), "a list": written(header="[]"),
    "null": written(header="null"), "deep": written(header="[" * 5000), "twice": written(header='{"a": 1, "a": 2}'),
    "format 1": written({"format": 1}), "format 3": written({"format": 3}), "format of words": written({"format": "2"}),
    "a field more": written({"covariance": True}), "layers 1e9": written({"layers": 10**9}),
    "layers -1": written({"layers": -1}), "layers 0": written({"layers": 0}),
    "layers in words": written({"layers": "2"}),
    "layers true": written({"layers": True}), "width 1e9": written({"width": 10**9}), "width 2": written({"width": 2}),
    "tokens": written({"tokens": "../x"}), "pooled": written({"tokens": "pooled"}), "gap NaN": written({"gap": np.nan}),
    "a hash that is a list": written({"base_hash": ["abc"]}),
    "NaN": written(changed={WHOLE: torch.full((3,), torch.nan).double()}),
    "Inf": written(changed={"0.text.spread": torch.full((3,), torch.inf).double()}),
    "negative variance": written(changed={"1.image.spread": -torch.ones(3).double()}),
    "no samples": written(changed={"1.image.count": torch.tensor(0.0).double()}),
    "float32": written(changed={WHOLE: torch.zeros(3)}), "integers": written(changed={WHOLE: torch.zeros(3).long()}),
    "a matrix": written(changed={WHOLE: torch.zeros(3, 1).double()}),
    "full covariance": written(changed={"0.image.spread": torch.eye(3).double()}),
    "count of three": written(changed={"0.image.count": torch.ones(3).double()}),
    "a tensor less": written(changed={WHOLE: None}), "a tensor more": written(changed={"x": torch.zeros(1)}),
    "another name": written(changed={WHOLE: None, "0.image.median": torch.zeros(3).double()}),
    "a layer of words": written(changed={WHOLE: None, "zero.image.mean": torch.zeros(3).double()}),
}  # fmt: skip


@pytest.mark.parametrize("what", ANCHORS)
def test_anchors(tmp_path, what):
    (tmp_path / "a.safetensors").write_bytes(ANCHORS[what])
    with pytest.raises(BurnishError) as caught:
        Anchor.load(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_bytes_anywhere_in_an_anchor(tmp_path_factory, place, put):
    """Whatever is written over it, an anchor is read or refused."""
    content = bytearray(written())
    content[place : place + len(put)] = put
    path = tmp_path_factory.mktemp("anchors") / "a.safetensors"
    path.write_bytes(content)
    try:
        Anchor.load(path)
    except BurnishError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "link to nothing", "device"])
def test_what_is_no_file_is_no_anchor(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(BurnishError, match="no anchor at"):
        Anchor.load(path)


@pytest.mark.parametrize(("about", "needle"), [
    ({}, "of 2 layers"), ({"layers": 4, "width": 5}, "of 5 channels"), ({"layers": 4, "width": 48}, "of other weights"),
])  # fmt: skip
def test_anchors_of_another_policy_in_a_run(refused, dataset, questions, tiny_smolvla, tmp_path, about, needle):
    about = {**ABOUT, **about}
    width, wanted = about["width"], {}
    for layer in range(about["layers"]):
        for group in ("image", "text"):
            wanted[f"{layer}.{group}.count"] = torch.tensor(9.0).double()
            wanted |= {f"{layer}.{group}.{part}": torch.ones(width).double() for part in ("mean", "spread")}
    file = tmp_path / "anchor.safetensors"
    save_file(wanted, file, metadata={"about": json.dumps(about)})
    method = f"[{{name: isolate, method: question_anchor, questions: {questions}, anchor: {file}}}]"
    line = refused(["train", f"--data.root={dataset}", f"--policy.path={tiny_smolvla}", f"--output={tmp_path / 'r'}",
                    "--train.steps=1", "--train.self_check=false", f"--objectives={method}"])  # fmt: skip
    assert needle.removeprefix("of ") in line and "burnish method isolate anchor" in line


# Question folders.


def folder(root, rows=None, images=None, meta=None):
    root.mkdir()
    if images is None:
        images = np.zeros((2, 8, 8, 3), np.uint8)
    np.save(root / "images.npy", images, allow_pickle=True)
    rows = [{"image": 0, "question": "q?", "answer": "a", "kind": "k"}] if rows is None else rows
    text = rows if isinstance(rows, str | bytes) else "".join(json.dumps(row) + "\n" for row in rows)
    (root / "questions.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (root / "meta.json").write_text(json.dumps({"camera": "front"}) if meta is None else meta)
    return root


def row(**changed):
    return [{"image": 0, "question": "q?", "answer": "a", **changed}]


class Bomb:
    """An object whose pickle would leave a file."""

    def __reduce__(self):
        return os.system, ("touch pickle_ran",)


FOLDERS = {
    "image -1": {"rows": row(image=-1)}, "image 2": {"rows": row(image=2)}, "image 1e30": {"rows": row(image=10**30)},
    "image true": {"rows": row(image=True)}, "image 0.0": {"rows": row(image=0.0)},
    "image '0'": {"rows": row(image="0")},
    "image missing": {"rows": [{"question": "q?", "answer": "a"}]}, "no question": {"rows": row(question=None)},
    "a number for an answer": {"rows": row(answer=3)}, "a list of answers": {"rows": row(answer=["a", "b"])},
    "kind null": {"rows": row(kind=None)}, "a line that is a list": {"rows": "[1]\n"}, "null": {"rows": "null\n"},
    "no JSON": {"rows": "{\n"}, "a key twice": {"rows": '{"image": 0, "image": 0}\n'}, "empty": {"rows": ""},
    "deep": {"rows": "[" * 3000 + "\n"}, "UTF-16": {"rows": json.dumps(row()[0]).encode("utf-16")},
    "no text": {"rows": b"\xff\xfe\xfd"}, "meta a list": {"meta": "[]"}, "meta null": {"meta": "null"},
    "meta without camera": {"meta": "{}"}, "camera a number": {"meta": '{"camera": 3}'},
    "camera empty": {"meta": '{"camera": ""}'}, "images float": {"images": np.zeros((2, 8, 8, 3), np.float32)},
    "images grey": {"images": np.zeros((2, 8, 8), np.uint8)},
    "images channels first": {"images": np.zeros((2, 3, 8, 8), np.uint8)},
    "images none": {"images": np.zeros((0, 8, 8, 3), np.uint8)},
    "images of 0": {"images": np.zeros((2, 0, 8, 3), np.uint8)},
    "images of 5000": {"images": np.zeros((1, 5000, 1, 3), np.uint8)},
    "images objects": {"images": np.array([Bomb()], dtype=object)},
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_question_folders(refused, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "q", **FOLDERS[what])
    refused(["method", "isolate", "anchor", "small", root, "-o", tmp_path / "a"], str(root))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


@pytest.mark.parametrize("name", ["images.npy", "questions.jsonl", "meta.json"])
@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "link out", "zero bytes", "device"])
def test_files_of_a_question_folder(tmp_path, name, kind):
    root = folder(tmp_path / "q")
    path = root / name
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link out":
        (tmp_path / "secret").write_bytes(content)
        path.symlink_to(tmp_path / "secret")
    elif kind == "zero bytes":
        path.touch()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(BurnishError) as caught:
        open_questions(root)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def npy(text):
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117) + b"\n"


@pytest.mark.parametrize("header", [
    b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x09\x00\x10\x00{}",
    npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10**12, 8, 8, 3), }"),
    npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 3)}"),
    npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }"),
    npy(b"__import__('os').system('touch numpy_ran')"),
    b"PK\x05\x06" + bytes(18),
])  # fmt: skip
def test_headers_of_images(tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "q")
    (root / "images.npy").write_bytes(header)
    with pytest.raises(BurnishError, match=r"images\.npy"):
        open_questions(root)
    assert not (tmp_path / "numpy_ran").exists()


# Imported pairs.


def png(size=(6, 4), mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, size).save(content, "PNG")
    return content.getvalue()


def bomb(width=60_000, height=60_000):
    """A PNG that says it has 3.6 billion pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def pair(**changed):
    return {"id": "1", "image": "a.png", "question": "q?", "answer": "a", **changed}


def pairs(tmp_path, rows, picture=None):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png() if picture is None else picture)
    (tmp_path / "secret.png").write_bytes(png())
    text = rows if isinstance(rows, str | bytes) else "".join(json.dumps(row) + "\n" for row in rows)
    (source / "pairs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return source / "pairs.jsonl"


LINES = {
    "empty": b"", "blank": b"\n \n", "a list": b"[]\n", "a string": b'"a"\n', "cut": b'{"image": "a.png"',
    "null": b"null\n",
    "UTF-16": json.dumps(pair()).encode("utf-16"), "latin-1": '{"question": "caf\xe9"}'.encode("latin-1"),
    "a key twice": b'{"image": "a.png", "image": "a.png"}', "deep": b"[" * 5000, "NaN": b"NaN\n",
    "no image": [{"question": "q", "answer": "a"}], "no question": [{"image": "a.png", "answer": "a"}],
    "no answer": [{"image": "a.png", "question": "q"}], "an empty question": [pair(question=" ")],
    "an answer that is a number": [pair(answer=2)], "answers": [pair(answer=["a", "a", "b"])],
    "a long answer": [pair(answer="a" * 5000)], "a null character": [pair(question="q\0?")], "kind 3": [pair(kind=3)],
    "an id twice": [pair(), pair()], "an id that is a list": [pair(id=[1])], "an id that is true": [pair(id=True)],
    "absolute": [pair(image="/etc/hostname")], "up": [pair(image="../secret.png")],
    "up and down": [pair(image="x/../../secret.png")], "home": [pair(image="~/a.png")],
    "null byte": [pair(image="a\0.png")],
    "missing": [pair(image="b.png")], "the folder": [pair(image=".")], "the lines": [pair(image="pairs.jsonl")],
    "a very long name": [pair(image="a" * 5000)], "image null": [pair(image=None)], "image a number": [pair(image=1)],
    "a URL": [pair(image="http://127.0.0.1:9/a.png")],
}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_lines_of_pairs(refused, untouched, tmp_path, what):
    source = pairs(tmp_path, LINES[what])
    check = untouched(tmp_path)
    refused(["data", "questions", "--from", source, "--root", tmp_path / "q"], "pairs.jsonl")
    check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.png", "source"]


PICTURES = {
    "empty": b"", "text": b"<svg></svg>", "cut": png((2000, 2000))[:3000],
    "flipped": png()[:40] + b"\xff" * 8 + png()[48:],
    "3.6 billion pixels": bomb(), "70 million pixels": bomb(10_000, 7_000), "no pixels": bomb(0, 5),
    "16 bits": png(mode="I;16"), "32 bits": png(mode="I"), "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n", "gif": None,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "numpy": b"\x93NUMPY\x01\x00",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", PICTURES)
def test_pictures_of_pairs(refused, tmp_path, what):
    content = PICTURES[what]
    if what == "gif":
        written = io.BytesIO()
        Image.new("P", (4, 4)).save(written, "GIF")
        content = written.getvalue()
    source = pairs(tmp_path, [pair()], content)
    refused(["data", "questions", "--from", source, "--root", tmp_path / "q"], "pairs.jsonl:1", "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.png", "source"]


@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "folder that is a link"])
def test_pictures_that_are_no_files_of_the_folder(refused, tmp_path, kind):
    image = "b.png"
    source = pairs(tmp_path, [pair(image="sub/a.png" if kind == "folder that is a link" else image)])
    path = source.parent / image
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link out":
        path.symlink_to(tmp_path / "secret.png")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "a.png").write_bytes(png())
        (source.parent / "sub").symlink_to(tmp_path / "elsewhere")
    refused(["data", "questions", "--from", source, "--root", tmp_path / "q"], "pairs.jsonl:1")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("words", "needle"), [
    (["data", "questions"], "--root"), (["data", "questions", "--root", "q"], "--from"),
    (["data", "questions", "tabletop", "3", "q", "--from", "p.jsonl"], "one of both"),
    (["data", "questions", "--from", "none.jsonl", "--root", "q"], "none.jsonl"),
    (["data", "questions", "--from", ".", "--root", "q"], "folder"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "q", "--image-size", "-1"], "8 to 4096"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "q", "--image-size", "1000000"], "8 to 4096"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "q", "--images", "nowhere"], "nowhere"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "mine"], "mine holds"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "file"], "is a file"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "file/q"], "is a file"),
    (["data", "questions", "--from", "source/pairs.jsonl", "--root", "source"], "source holds"),
], ids=str)  # fmt: skip
def test_arguments_of_an_import(refused, untouched, tmp_path, monkeypatch, words, needle):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path, [pair()])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    check = untouched(tmp_path)
    refused(words, needle)
    check()


def test_an_import_that_is_whole(accepted, refused, tmp_path):
    """Upright, on black, stored once; the same command again changes nothing, another one is told; extra keys do."""
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:2], picture[2:] = (255, 0, 0), (0, 0, 255)
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(content, "PNG", exif=exif)
    rows = [
        pair(id=1, answer=" a cup ", extra={"x": [1]}),
        pair(id="2", question="größer?", kind="size"),
        pair(id=None),
    ]
    source = pairs(tmp_path, "﻿" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), content.getvalue())
    words = ["data", "questions", "--from", source, "--root", tmp_path / "q", "--image-size", "16"]
    accepted(words, "3 questions about 1 images")
    found = open_questions(tmp_path / "q")
    assert [(e["question"], e["answer"], e["kind"]) for e in found.entries] == [
        ("q?", "a cup", "other"), ("größer?", "a", "size"), ("q?", "a", "other"),
    ]  # fmt: skip
    image = np.array(found.images[0])
    assert image.shape == (16, 16, 3) and not image[:4].any() and not image[-4:].any()
    assert image[4, 8].tolist() == [0, 0, 255] and image[-5, 8].tolist() == [255, 0, 0]
    before = (tmp_path / "q" / "images.npy").stat().st_mtime_ns
    accepted(words, "3 questions")
    assert (tmp_path / "q" / "images.npy").stat().st_mtime_ns == before
    refused([*words[:-1], "32"], "holds other questions")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "secret.png", "source"]


def test_a_cut_import_leaves_nothing_and_is_made_again(tmp_path, monkeypatch):
    from burnish.data import question_import

    source = pairs(tmp_path, [pair(id=i) for i in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(question_import, "picture", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_questions(source, tmp_path / "q", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.png", "source"]
    assert len(open_questions(import_questions(source, tmp_path / "q", progress=False)).entries) == 3


# Options.


@pytest.mark.parametrize("options", [
    {"method": "aegis", "control": "nonsense"}, {"method": "l2sp", "control": "shuffled"}, {"method": 3},
    {"method": "random", "control": "wrong_anchor"}, {"method": "self_anchor", "control": "wrong_anchor"},
    {"method": "wrong_anchor", "anchor": "a.safetensors"}, {"method": "aegis", "control": None},
    {"method": "aegis", "every": 0}, {"method": "aegis", "every": 1.5}, {"method": "aegis", "share": 0},
    {"method": "aegis", "share": float("nan")}, {"method": "aegis", "weight": float("inf")},
    {"method": "replay", "turns": 65},
    {"method": "aegis", "strength": -1}, {"method": "aegis", "answers": "yes"},
    {"method": "aegis", "tokens": ["apart"]},
    {"method": "aegis", "rule": "none of these"}, {"method": "aegis", "distance": "bures"},
    {"method": "aegis", "cov": True},
    {"questions": "~nobody-of-this-name/q"}, {"questions": None}, {"anchor_samples": -3}, {"anchor_samples": 1e9},
    {"probe": {"samples": 0}}, {"probe": {"samples": True}}, {"probe": {"questions": 3}}, {"probe": "everything"},
    {"probe": {"text": "~nobody-of-this-name/t"}}, {"probe": [1]},
], ids=str)  # fmt: skip
def test_options_of_isolate(options):
    with pytest.raises(BurnishError) as caught:
        Isolate(**options)
    assert str(caught.value).startswith("isolate") and "\n" not in str(caught.value)


def test_home_folders_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Isolate(questions="~/q", anchor="~/a.safetensors", probe={"questions": "~/h", "text": "~/t.txt"})
    assert (made.inputs.questions, made.inputs.anchor) == (f"{tmp_path}/q", f"{tmp_path}/a.safetensors")
    assert (made.watched.questions, made.watched.text) == (f"{tmp_path}/h", f"{tmp_path}/t.txt")


@pytest.mark.parametrize("text", [None, b"", b"\n \n", b"\xff\xfe", "pipe"])
def test_passages(tmp_path, text):
    from burnish.methods.isolate.probe import read_passages

    path = tmp_path / "t.txt"
    if text == "pipe":
        os.mkfifo(path)
    elif text is not None:
        path.write_bytes(text)
    with pytest.raises(BurnishError, match="t.txt"):
        read_passages(path)


def test_the_help_names_both_sources(capsys):
    with pytest.raises(SystemExit):
        main(["data", "questions", "--help"])
    assert "--from JSONL" in capsys.readouterr().out
