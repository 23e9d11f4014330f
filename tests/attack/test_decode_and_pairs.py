"""Decoders, token policies, FAST tokenizers, labels and pair folders: whatever is wrong ends in one line."""

import json
import os
import shutil

import pytest

from burnish.data.pairs import FACTS, INDEX
from workshop.tiny import make_tiny

HUGE = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A token policy of the data set's cameras and dimensions. Do not write into it."""
    target = tmp_path_factory.mktemp("tokens") / "p"
    options = {"block_size": 3, "chunk_size": 4, "n_action_steps": 2}
    return make_tiny("burnish_discrete", target, cameras=("front",), state_dim=4, action_dim=3, overrides=options)


@pytest.fixture
def root(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "pairs", ignore=shutil.ignore_patterns(".frames"))


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


BOMB = "[" + "*a, " * 10 + "]"

DECODE = {
    "threshold is no number": ["--option", "threshold=.nan"],
    "threshold below 0": ["--option", "threshold=-1"],
    "threshold of words": ["--option", "threshold=high"],
    "no value": ["--option", "threshold="],
    "no equals": ["--option", "threshold"],
    "no name": ["--option", "=3"],
    "twice": ["--option", "threshold=0.5", "--option", "threshold=0.9"],
    "half a block": ["--option", "block=0.5"],
    "negative block": ["--option", "block=-3"],
    "no divisor": ["--option", "block=5"],
    "huge block": ["--option", f"block={HUGE}"],
    "no append": ["--option", "append=0"],
    "no share": ["--option", "share=0"],
    "unknown rule": ["--option", "min_unmasked=half"],
    "unknown order": ["--option", "order=late"],
    "order is a list": ["--option", "order=[1]"],
    "no legal ids": ["--option", "legal=[]"],
    "illegal ids": ["--option", "legal=[99999]"],
    "no steps": ["--option", "steps=0"],
    "width below 0": ["--option", "width=-1"],
    "unknown ties": ["--option", "ties=some"],
    "unknown option": ["--option", "tau=1"],
    "yaml with aliases": ["--option", f"legal={BOMB}"],
    "yaml that is none": ["--option", "legal=[1"],
    "deep yaml": ["--option", "legal=" + "[" * 500 + "]" * 500],
    "unknown decoder": ["--decoder", "greedy"],
    "a class as decoder": ["--decoder", "subprocess:Popen"],
    "a path as decoder": ["--decoder", "../../evil"],
    "auto without budget": ["--decoder", "auto", "--option", "budget=2"],
    "auto of nan": ["--decoder", "auto", "--option", "budget=.nan"],
    "auto repeats": ["--decoder", "auto", "--option", "repeats=0"],
    "cold tokens": ["--decoder", "dd_vla", "--option", "temperature=-1"],
    "endless steps": ["--decoder", "dd_vla", "--option", "steps=.inf"],
    "remask is a number": ["--decoder", "dd_vla", "--option", "remask=2"],
    "causal decoder": ["--decoder", "autoregressive"],
    "no observations": ["--count", "0"],
    "too many observations": ["--count", str(HUGE)],
    "count of words": ["--count", "many"],
    "no repeats": ["--repeats", "0"],
    "too many repeats": ["--repeats", str(HUGE)],
    "no data": ["--data", "nowhere"],
}


@pytest.mark.parametrize("words", DECODE.values(), ids=DECODE)
def test_decode_arguments(folder, words, refused):
    refused(["policy", "decode", folder, "--repeats", "1", *words])


PROFILE = {
    "no batch": ["--batch-size", "0"],
    "huge batch": ["--batch-size", str(HUGE)],
    "no repeats": ["--repeats", "0"],
    "huge warmup": ["--warmup", str(HUGE)],
    "huge threads": ["--threads", str(HUGE)],
    "bad field": ["--set", "x=1"],
    "class as field": ["--set", "decoder=os:system"],
    "field twice": ["--set", "dtype=bfloat16", "--set", "dtype=float32"],
    "bad dtype": ["--set", "dtype=int8"],
    "bad weights": ["--set", "token_weights=t"],
    "options are a list": ["--set", "decoder_options=[1]"],
    "bad options": ["--set", "decoder_options={threshold: -1}"],
    "huge chunk": ["--set", f"chunk_size={HUGE}"],
    "negative actions": ["--set", "n_action_steps=-1"],
    "one bin": ["--set", "bins=1"],
    "huge bins": ["--set", f"bins={HUGE}"],
    "huge images": ["--set", f"image_size={HUGE}"],
    "huge text": ["--set", f"tokenizer_max_length={HUGE}"],
    "huge state": ["--set", f"max_state_dim={HUGE}"],
    "huge fast": ["--set", f"fast_length={HUGE}"],
    "nan weight": ["--set", "ordinal_weight=.nan"],
    "no deviation": ["--set", "image_std=[0, 0, 0]"],
    "two means": ["--set", "image_mean=[0.5, 0.5]"],
    "noise window": ["--set", "noise=pipeline", "--set", "noise_options={window: .nan}"],
    "noise share": ["--set", "noise=d2f", "--set", "noise_options={low: -3}"],
    "no data": ["--data", "nowhere"],
}


@pytest.mark.parametrize("words", PROFILE.values(), ids=PROFILE)
def test_profile_arguments(folder, words, refused):
    refused(["policy", "profile", folder, "--repeats", "1", "--warmup", "0", *words])


@pytest.mark.parametrize("words", [
    ["decode", "--count", "0"], ["decode", "--option", "block=5"], ["decode", "--option", "threshold=.inf"],
    ["decode", "--data", "nowhere"], ["score", "nowhere"], ["score", "nowhere", "--draws", "0"],
    ["score", "nowhere", "--observations", "-1"], ["score", "nowhere", "--steps", str(HUGE)],
    ["score", "nowhere", "--disturbance", "nan"], ["score", "nowhere", "--candidates", "1"],
], ids=" ".join)  # fmt: skip
def test_verify_arguments(folder, words, refused):
    kind, *rest = words
    refused(["policy", "verify", kind, folder, *rest])


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A token policy with FAST tokens. Do not write into it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        ["".join(map(chr, range(200)))], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    source = tmp_path_factory.mktemp("fast") / "fast"
    source.mkdir()
    pairs.save(str(source / "tokenizer.json"))
    (source / "processor_config.json").write_text(json.dumps({"scale": 10, "min_token": -100}))
    options = {"tokenizer": "fast", "fast_folder": str(source), "fast_length": 32, "chunk_size": 4, "n_action_steps": 2}
    return make_tiny("burnish_discrete", source.parent / "p", cameras=("front",), state_dim=4, action_dim=3,
                     overrides=options)  # fmt: skip


FAST = {
    "scale 0": ("processor_config.json", '{"scale": 0, "min_token": 0}'),
    "scale nan": ("processor_config.json", '{"scale": NaN, "min_token": 0}'),
    "scale huge": ("processor_config.json", '{"scale": 1e300, "min_token": 0}'),
    "no scale": ("processor_config.json", '{"min_token": 0}'),
    "token of words": ("processor_config.json", '{"scale": 1, "min_token": "low"}'),
    "token huge": ("processor_config.json", '{"scale": 1, "min_token": -1e12}'),
    "a list": ("processor_config.json", "[1]"),
    "no JSON": ("processor_config.json", "{"),
    "twice": ("processor_config.json", '{"scale": 1, "scale": 2, "min_token": 0}'),
    "no tokenizer": ("tokenizer.json", "{}"),
    "empty": ("tokenizer.json", ""),
    "pointer": ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "other model": ("tokenizer.json", '{"model": {"type": "os.system"}}'),
}


@pytest.mark.parametrize(("name", "content"), FAST.values(), ids=FAST)
def test_fast_tokenizers(fast, tmp_path, name, content, refused):
    copy = shutil.copytree(fast, tmp_path / "p")
    (copy / "fast" / name).write_text(content)
    refused(["policy", "decode", copy, "--count", "1", "--repeats", "1"])


def test_a_pipe_in_place_of_a_tokenizer(fast, tmp_path, refused):
    copy = shutil.copytree(fast, tmp_path / "p")
    (copy / "fast/tokenizer.json").unlink()
    os.mkfifo(copy / "fast/tokenizer.json")
    refused(["policy", "decode", copy, "--count", "1", "--repeats", "1"])


def test_what_lies_beside_a_tokenizer_is_copied_and_so_no_link(fast, tmp_path, refused):
    copy = shutil.copytree(fast, tmp_path / "p")
    (tmp_path / "secret").write_text("key")
    (copy / "fast/notes.txt").symlink_to(tmp_path / "secret")
    assert "outside" in refused(["policy", "decode", copy, "--count", "1", "--repeats", "1"])


LABELS = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[1, 2]",
    "null": "null",
    "a number": "7",
    "one side": {"chosen": 1},
    "no rejected": {"chosen": 1, "rejected": None},
    "halves": {"chosen": 1.5, "rejected": 2},
    "truth values": {"chosen": True, "rejected": False},
    "three numbers": {"chosen": [1, 2, 3], "rejected": 2},
    "words": {"chosen": "first", "rejected": "second"},
    "infinite": '{"chosen": Infinity, "rejected": 2}',
    "huge": {"chosen": HUGE, "rejected": 0},
    "negative": {"chosen": -1, "rejected": 2},
    "far frame": {"chosen": [0, HUGE], "rejected": [2, 0]},
    "itself": {"chosen": [0, 1], "rejected": [0, 3]},
    "twice a key": '{"chosen": 0, "chosen": 1, "rejected": 2}',
    "deep": '{"chosen": ' + "[" * 200 + "]" * 200 + "}",
    "no steps": {"chosen": 0, "rejected": {"action": []}},
    "steps of words": {"chosen": 0, "rejected": {"action": [["a"]]}},
    "nan step": '{"chosen": 0, "rejected": {"action": [[NaN, 0, 0]]}}',
    "ragged": {"chosen": 0, "rejected": {"action": [[0, 0, 0], [0, 0]]}},
    "narrow": {"chosen": 0, "rejected": {"action": [[0.5]]}},
    "flat": {"chosen": 0, "rejected": {"action": [0.5, 1, 2]}},
    "action and more": {"chosen": 0, "rejected": {"action": [[0, 0, 0]], "episode": 1}},
    "long": {"chosen": 0, "rejected": {"action": [[0.5, 0.5, 0.5]] * 5000}},
    "success of words": {"episode": 0, "success": "yes"},
    "success of one": {"episode": 0, "success": 1},
    "success nowhere": {"success": True},
    "success far": {"episode": 99, "success": True},
    "success and pair": {"episode": 0, "success": True, "chosen": 1},
}


@pytest.mark.parametrize("line", LABELS.values(), ids=LABELS)
def test_label_files(root, tmp_path, line, refused, untouched):
    check = untouched(root)
    labels = write(tmp_path / "labels.jsonl", line)
    refused(
        ["data", "pairs", "--labels", labels, "--root", root, "--state-tolerance", "1e9", "--image-tolerance", "255"]
    )
    check()


def _folder(path):
    path.mkdir()


def _pipe(path):
    os.mkfifo(path)


def _binary(path):
    path.write_bytes(b"\xff\xfe" + '{"chosen": 0}'.encode("utf-16-le"))


@pytest.mark.parametrize("make", [_folder, _pipe, _binary, lambda path: path.symlink_to("nowhere")],
                         ids=["folder", "pipe", "utf-16", "broken link"])  # fmt: skip
def test_things_in_place_of_labels(root, tmp_path, make, refused):
    make(tmp_path / "labels.jsonl")
    refused(["data", "pairs", "--labels", tmp_path / "labels.jsonl", "--root", root])


@pytest.mark.parametrize("words", [
    ["--success", "nothing"], ["--success", "action"], ["--success", "observation.images.front"],
    ["--takeover", "index"], ["--proposal", "action"], ["--takeover", "index", "--proposal", "action"],
    ["--takeover", "frame_index", "--proposal", "nothing"], ["--labels", "nowhere.jsonl"],
    ["--success", "next.success", "--state-tolerance", "-1"], ["--success", "next.success", "--image-tolerance", "nan"],
    ["--success", "next.success", "policy", "tabletop:lift"], [],
], ids=" ".join)  # fmt: skip
def test_import_arguments(root, words, refused, untouched):
    check = untouched(root)
    refused(["data", "pairs", *words, "--root", root])
    check()


GOOD = {"format": 1, "pairs": 1, "state_tolerance": 1e9, "source": "test"}
FOLDERS = {
    "format": {**GOOD, "format": 9},
    "count": {**GOOD, "pairs": 2},
    "tolerance of words": {**GOOD, "state_tolerance": "x"},
    "negative": {**GOOD, "state_tolerance": -1},
    "two tolerances": {**GOOD, "state_tolerance": [1, 2]},
    "list of words": {**GOOD, "state_tolerance": ["a"] * 4},
    "outcomes": {**GOOD, "outcomes": [True]},
    "outcomes of words": {**GOOD, "outcomes": ["a", "b", "c"]},
    "outcomes is a word": {**GOOD, "outcomes": "yes"},
    "a list": [1],
    "null": None,
    "infinite": '{"format": 1, "pairs": 1, "state_tolerance": Infinity}',
}


@pytest.mark.parametrize("facts", FOLDERS.values(), ids=FOLDERS)
def test_pair_folders(folder, dataset, root, tmp_path, facts, refused):
    write(root / INDEX, {"chosen": [0, 0], "rejected": [2, 0]})
    write(root / FACTS, facts)
    train_on(folder, dataset, root, tmp_path, refused)


@pytest.mark.parametrize("options", [
    "loss: kto", "held_out: 1", "held_out: .nan", "loss: [1]", "score: {t_min: 2}", "score: {draws: 1000000000.5}",
    "steps: -1",
])  # fmt: skip
def test_options_of_prefer(folder, dataset, root, tmp_path, options, refused):
    write(root / INDEX, {"chosen": [0, 0], "rejected": [2, 0]})
    write(root / FACTS, GOOD)
    train_on(folder, dataset, root, tmp_path, refused, options)


def train_on(folder, dataset, root, tmp_path, refused, options="pool: 1"):
    refused(["train", f"--policy.path={folder}", f"--data.root={dataset}", f"--output={tmp_path / 'run'}",
             "--train.steps=1", f"--objectives=[{{name: prefer, pairs: {root}, {options}}}]"])  # fmt: skip


def test_what_is_right_is_imported(root, tmp_path, accepted):
    proposal = {"action": [[0.5, 0.5, 0.5]]}
    labels = write(tmp_path / "l.jsonl", {"chosen": [0, 1], "rejected": proposal}, {"episode": 1, "success": False})
    accepted(["data", "pairs", "--labels", labels, "--root", root], "1 pairs and outcomes of 1 episodes")
