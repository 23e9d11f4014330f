"""Policy folders that lie: each ends in one line, runs nothing, reads nothing outside, and fills no memory."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.policies import pipelines

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
CODE = "from pathlib import Path\nPath(__file__).parent.joinpath('MARKER').write_text('ran')\nclass Own: pass\n"


@pytest.fixture
def folder(tiny_smolvla, tmp_path) -> Path:
    """A copy of a tiny policy that a test may spoil."""
    return Path(shutil.copytree(tiny_smolvla, tmp_path / "policy"))


def look(folder: Path) -> list[str]:
    """The words of a command that loads the folder and calls the policy once."""
    return ["policy", "profile", str(folder), "--repeats", "1", "--warmup", "0"]


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def setting(file: str, **fields):
    return lambda folder: edit(folder / file, lambda content: content.update(fields))


def text(file: str, content: str | bytes):
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(raw)


def gone(name: str):
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def pipe(file: str):
    def make(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return make


def link(file: str, target: str = ""):
    """The file becomes a link to a copy of itself outside the folder, or to `target`."""

    def make(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(target or outside)

    return make


def step(kind: str, file: str = PRE, drop=(), **fields):
    """Change an entry of a pipeline."""

    def change(content):
        for entry in content["steps"]:
            if entry["registry_name"] == kind:
                entry.update(fields)
                for name in drop:
                    entry.pop(name)

    return lambda folder: edit(folder / file, change)


def option(kind: str, file: str = PRE, **fields):
    def change(content):
        next(entry for entry in content["steps"] if entry["registry_name"] == kind)["config"].update(fields)

    return lambda folder: edit(folder / file, change)


def steps(change, file: str = PRE):
    return lambda folder: edit(folder / file, lambda content: content.update(steps=change(content["steps"])))


def weights(change, file: str = "model.safetensors"):
    def make(folder: Path) -> None:
        state = load_file(folder / file)
        save_file(change(state) or state, folder / file)

    return make


def first(state, value):
    name = sorted(name for name in state if state[name].ndim == 2)[0]
    state[name] = value(state[name])


def nested(part: str, **fields):
    return lambda folder: edit(folder / "vlm/config.json", lambda content: content[part].update(fields))


def features(key: str, **fields):
    return lambda folder: edit(folder / "config.json", lambda content: content["input_features"][key].update(fields))


def shards(weight_map=None, **more):
    """The weights in two shards with an index, which is then spoilt."""

    def make(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        names = sorted(state)
        half = len(names) // 2
        parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
        for file, own in parts.items():
            save_file({name: state[name] for name in own}, folder / file)
        (folder / "model.safetensors").unlink()
        index = {name: file for file, own in parts.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        edit(folder / "model.safetensors.index.json", lambda content: {**content, **more})
        if weight_map:
            edit(folder / "model.safetensors.index.json", lambda content: {"weight_map": weight_map(index)})

    return make


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


CONFIGS = {
    "a list": (text("config.json", "[]"), "a list"), "null": (text("config.json", "null"), "null"),
    "too deep": (text("config.json", "[" * 100_000), "too deep"), "not JSON": (text("config.json", "{"), "is not JSON"),
    "twice": (text("config.json", '{"type": "smolvla", "type": "pi0"}'), "twice"),
    "utf-16": (text("config.json", '{"type": "smolvla"}'.encode("utf-16")), "UTF-16"),
    "no utf-8": (text("config.json", b"\xff\x00\xfe"), "UTF-8"),
    "a pointer": (text("config.json", "version https://git-lfs.github.com/spec/v1\noid x"), "Git LFS"),
    "a pipe": (pipe("config.json"), "no policy at"), "a link out": (link("config.json"), "outside"),
    "a device": (link("config.json", "/dev/zero"), "no policy at"), "absent": (gone("config.json"), "no policy at"),
    "no type": (setting("config.json", type=None), "policy type None"),
    "a type that is a list": (setting("config.json", type=["smolvla"]), "policy type"),
    "a type that is a path": (setting("config.json", type="os:system"), "policy type"),
    "empty cameras": (setting("config.json", empty_cameras=10**9), "empty_cameras"),
    "fewer than no cameras": (setting("config.json", empty_cameras=-1), "empty_cameras"),
    "steps": (setting("config.json", num_steps=10**9), "num_steps"),
    "negative steps": (setting("config.json", num_steps=-3), "num_steps"),
    "no steps": (setting("config.json", num_steps=0), "num_steps"),
    "no cache": (setting("config.json", use_cache=False), "use_cache"),
    "aloha": (setting("config.json", adapt_to_pi_aloha=True), "adapt_to_pi_aloha"),
    "less than a patch": (setting("config.json", resize_imgs_with_padding=[1, 1]), "resize_imgs_with_padding"),
    "parts of patches": (setting("config.json", resize_imgs_with_padding=[97, 50]), "resize_imgs_with_padding"),
    "chunk": (setting("config.json", chunk_size=10**9, n_action_steps=1), "chunk_size"),
    "chunk of text": (setting("config.json", chunk_size="8"), "chunk_size"),
    "chunk of true": (setting("config.json", chunk_size=True), "chunk_size"),
    "chunk of nothing": (setting("config.json", chunk_size=None), "chunk_size"),
    "chunk of NaN": (setting("config.json", chunk_size=float("nan")), "chunk_size"),
    "state width": (setting("config.json", max_state_dim=10**9), "max_state_dim"),
    "tokens": (setting("config.json", tokenizer_max_length=10**9), "tokenizer_max_length"),
    "layers": (setting("config.json", num_vlm_layers=10**9), "num_vlm_layers"),
    "negative layers": (setting("config.json", num_vlm_layers=-5), "num_vlm_layers"),
    "negative expert layers": (setting("config.json", num_expert_layers=-7), "num_expert_layers"),
    "odd expert layers": (setting("config.json", num_expert_layers=3), "cannot be built"),
    "expert width": (setting("config.json", expert_width_multiplier=float("inf")), "expert_width_multiplier"),
    "negative width": (setting("config.json", expert_width_multiplier=-1.0), "expert_width_multiplier"),
    "image size": (setting("config.json", resize_imgs_with_padding=[10**9, 10**9]), "resize_imgs_with_padding"),
    "image size of text": (setting("config.json", resize_imgs_with_padding=["a", 1]), "resize_imgs_with_padding"),
    "features": (setting("config.json", input_features=[]), "features action"),
    "a thousand cameras": (
        lambda folder: edit(folder / "config.json", lambda c: c["input_features"].update(
            {f"observation.images.{i}": {"type": "VISUAL", "shape": [3, 8, 8]} for i in range(1000)})), "at most 64"),
    "huge pictures": (features("observation.images.top", shape=[3, 10**9, 10**9]), "shape of"),
    "negative shape": (features("observation.state", shape=[-7]), "shape of"),
    "flat pictures": (features("observation.images.top", shape=[32, 32]), "channels"),
    "no shape": (features("observation.images.top", shape=None), "shape of"),
    "no normalisation": (setting("config.json", normalization_mapping={}), "normalised"),
    "odd normalisation": (setting("config.json", normalization_mapping={"STATE": "X", "ACTION": "Y"}), "cannot be"),
    "unknown field": (setting("config.json", surprise=1), "surprise"),
    "a model type alone": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(model_type=c.pop("type"))), "model_type"),
}  # fmt: skip

STEPS = {
    "a list": (text(PRE, "[1]"), "a list"), "null": (text(POST, "null"), "null"),
    "too deep": (text(PRE, '{"steps": ' + "[" * 5000 + "]" * 5000 + "}"), "too deep"),
    "no steps": (setting(PRE, steps={}), "no steps"), "a step of text": (setting(PRE, steps=["x"]), "no JSON object"),
    "no registry name": (step("to_batch_processor", drop=["registry_name"]), "registry_name"),
    "unknown step": (step("to_batch_processor", registry_name="reward_classifier_processor"), "one of "),
    "another policy's step": (step("to_batch_processor", registry_name="groot_n1_7_pack_inputs_v1"), "one of "),
    "a hub name": (step("to_batch_processor", registry_name="owner/step"), "one of "),
    "unknown key": (step("to_batch_processor", init="x"), "'init'"),
    "options of text": (step("to_batch_processor", config="x"), "options"),
    "unknown option": (option("tokenizer_processor", trust_remote_code=True), "trust_remote_code"),
    "token length": (option("tokenizer_processor", max_length=10**9), "max_length"),
    "padding": (option("tokenizer_processor", padding="sideways"), "padding"),
    "precision": (option("device_processor", float_dtype="pickle"), "float_dtype"),
    "device": (option("device_processor", POST, device="banana"), "device_processor"),
    "twice normalised": (steps(lambda s: [*s, s[-1]]), "a second 'normalizer_processor'"),
    "not normalised": (steps(lambda s: s[:-1]), "no statistic 'mean'"),
    "not normalised back": (steps(lambda s: s[1:], POST), "no statistic 'mean' of action"),
    "no tokens": (steps(lambda s: [e for e in s if "tokenizer" not in e["registry_name"]]), "tokenizer_processor"),
    "epsilon": (option("normalizer_processor", eps=-1.0), "eps"),
    "keys left out": (option("normalizer_processor", normalize_observation_keys=[]), "normalize_observation_keys"),
    "statistics inside": (option("normalizer_processor", stats={"action": {"mean": [0]}}), "stats"),
    "a camera renamed": (option("rename_observations_processor", rename_map={
        "observation.images.top": "observation.images.other"}), "observation.images.top"),
    "renamed to a list": (option("rename_observations_processor", rename_map={"a": ["b"]}), "rename_map"),
    "state above": (step("normalizer_processor", state_file=f"../{STATE_FILE}"), "state_file"),
    "state elsewhere": (step("normalizer_processor", state_file="/etc/passwd.safetensors"), "state_file"),
    "state of numbers": (step("normalizer_processor", state_file=7), "state_file"),
    "state absent": (gone(STATE_FILE), STATE_FILE), "state in a pipe": (pipe(STATE_FILE), "pipe"),
    "state by a link": (link(STATE_FILE), "outside"), "state cut": (text(STATE_FILE, b"\x10"), "cannot be read"),
    "state pickled": (text(STATE_FILE, b"\x80\x04cos\nsystem\n"), "cannot be read"),
    "NaN": (weights(lambda s: s.update({"action.std": s["action.std"] * torch.nan}), STATE_FILE), "finite"),
    "negative deviation": (weights(lambda s: s.update({"action.std": -s["action.std"]}), STATE_FILE), "negative std"),
    "narrow": (weights(lambda s: s.update({"action.mean": s["action.mean"][:3]}), STATE_FILE), "3 dimensions"),
    "odd shape": (weights(lambda s: s.update({"action.mean": s["action.mean"][:, None]}), STATE_FILE), "dimensions"),
    "nothing stored": (weights(lambda s: {"a": torch.zeros(1)}, STATE_FILE), "cannot be made"),
    "only one file": (gone(POST), f"no {POST}"),
}  # fmt: skip

WEIGHTS = {
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "cannot be read"),
    "empty": (text("model.safetensors", b""), "cannot be read"),
    "pickled": (text("model.safetensors", b"\x80\x04cos\nsystem\n"), "cannot be read"),
    "a long header": (text("model.safetensors", b"\xff" * 8 + b"{}"), "cannot be read"),
    "absent": (gone("model.safetensors"), "model.safetensors cannot be read"),
    "a pipe": (pipe("model.safetensors"), "pipe"), "a link out": (link("model.safetensors"), "outside"),
    "a pointer": (text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid x"), "Git LFS"),
    "NaN": (weights(lambda s: first(s, lambda t: t * torch.nan)), "NaN or infinity"),
    "one infinity": (weights(lambda s: first(s, lambda t: t.index_fill(0, torch.tensor([0]), torch.inf))), "infinity"),
    "whole numbers": (weights(lambda s: first(s, lambda t: t.to(torch.int8))), "int8"),
    "one missing": (weights(lambda s: {k: v for k, v in list(s.items())[1:]}), "1 missing"),
    "one too many": (weights(lambda s: s.update(stray=torch.zeros(1))), "1 unknown (stray)"),
    "index above": (shards(lambda m: {k: f"../{v}" for k, v in m.items()}), "leads out"),
    "index elsewhere": (shards(lambda m: dict.fromkeys(m, "/etc/passwd")), "leads out"),
    "index of a file that is not there": (shards(lambda m: dict.fromkeys(m, "model-9.safetensors")), "no file at"),
    "index without a tensor": (shards(lambda m: {k: v for k, v in list(m.items())[1:]}), "does not place"),
    "index with one more": (shards(lambda m: {**m, "stray": next(iter(m.values()))}), "in no shard"),
    "index that is a list": (both(shards(), text("model.safetensors.index.json", "[]")), "a list"),
    "index without a map": (both(shards(), text("model.safetensors.index.json", "{}")), "no weight_map"),
    "a shard in a pipe": (both(shards(), pipe("model-00001-of-00002.safetensors")), "pipe"),
    "a shard by a link": (both(shards(), link("model-00001-of-00002.safetensors")), "outside"),
}  # fmt: skip

VLM = {
    "own config": (setting("vlm/config.json", auto_map={"AutoConfig": "own.Own"}), "code of its own"),
    "own tokenizer": (setting("vlm/tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}), "code of"),
    "own processor": (setting("vlm/processor_config.json", auto_map={"AutoProcessor": "own.Own"}), "code of its own"),
    "own part": (nested("text_config", auto_map={"AutoModel": "own.Own"}), "code of its own"),
    "from another": (setting("vlm/config.json", auto_map={"AutoConfig": "owner/repo--own.Own"}), "code of its own"),
    "trust": (setting("vlm/processor_config.json", trust_remote_code=True), "code of its own"),
    "kernel": (setting("vlm/config.json", _attn_implementation="owner/kernel"), "_attn_implementation"),
    "deep kernel": (nested("vision_config", attn_implementation="owner/kernel"), "attn_implementation"),
    "class": (setting("vlm/tokenizer_config.json", tokenizer_class="Trainer"), "tokenizer_class"),
    "function": (setting("vlm/processor_config.json", processor_class="pipeline"), "processor_class"),
    "type": (setting("vlm/config.json", model_type="../../own"), "model_type"),
    "another type": (setting("vlm/config.json", model_type="llama"), "smolvlm"),
    "number type": (setting("vlm/config.json", dtype="load"), "dtype"),
    "other files": (setting("vlm/config.json", configuration_files=["../config.4.0.0.json"]), "other files"),
    "other tokenizer": (setting("vlm/tokenizer_config.json", tokenizer_file="/etc/passwd"), "tokenizer_file"),
    "vocabulary above": (setting("vlm/tokenizer_config.json", vocab_file="../config.json"), "vocab_file"),
    "arguments": (setting("vlm/tokenizer_config.json", init_inputs=["/etc/passwd"]), "init_inputs"),
    "quantised": (setting("vlm/config.json", quantization_config={"quant_method": "bnb"}), "quantised"),
    "adapter": (text("vlm/adapter_config.json", '{"base_model_name_or_path": "owner/base"}'), "adapter"),
    "a list": (text("vlm/config.json", "[]"), "a list"), "null": (text("vlm/tokenizer_config.json", "null"), "vlm"),
    "too deep": (text("vlm/processor_config.json", "[" * 5000 + "]" * 5000), "too deep"),
    "width": (nested("text_config", hidden_size=10**9), "hidden_size"),
    "words": (nested("text_config", vocab_size=9_000_000), "numbers"),
    "wide words": (nested("text_config", vocab_size=9_000_000, hidden_size=4098), "numbers"),
    "layers": (nested("text_config", num_hidden_layers=10**9), "num_hidden_layers"),
    "negative layers": (nested("vision_config", num_hidden_layers=-1), "num_hidden_layers"),
    "NaN": (nested("text_config", rms_norm_eps=float("nan")), "rms_norm_eps"),
    "text": (nested("text_config", hidden_size="wide"), "hidden_size"),
    "defaults": (lambda f: edit(f / "vlm/config.json", lambda c: {"model_type": "smolvlm"}), "numbers|cannot be built"),
    "heads": (nested("text_config", num_attention_heads=7), "cannot be read"),
    "patches": (nested("vision_config", patch_size=1, image_size=8192), "numbers"),
    "activation": (nested("text_config", hidden_act="os.system"), "cannot be built"),
    "tokens": (text("vlm/tokenizer.json", "{"), "tokenizer"),
    "other tokens": (text("vlm/tokenizer.json", '{"model": {"type": "BPE"}}'), "tokenizer"),
    "token ids": (lambda f: edit(f / "vlm/tokenizer.json", lambda c: c["model"]["vocab"].update({"zz": 2**31})), "id"),
    "no tokens": (gone("vlm/tokenizer.json"), "tokenizer"), "a pipe": (pipe("vlm/config.json"), "pipe"),
    "tokens in a pipe": (pipe("vlm/tokenizer.json"), "pipe"), "any pipe": (pipe("vlm/notes.json"), "pipe"),
    "a link out": (link("vlm/tokenizer.json"), "outside"), "absent": (gone("vlm"), "cp -rL|no vlm/"),
    "all of it a link": (link("vlm"), "outside"),
    "only a hub name": (both(gone("vlm"), setting("config.json", vlm_model_name="owner/vlm")), "hf download owner/vlm"),
    "only a path above": (both(gone("vlm"), setting("config.json", vlm_model_name="..")), "no vlm/"),
    "a book for a name": (both(gone("vlm"), setting("config.json", vlm_model_name="/x" * 3000)), "no vlm/"),
    "a long hub name": (both(gone("vlm"), setting("config.json", vlm_model_name=f"a/{'x' * 300}")), "no vlm/"),
    "a number for a name": (both(gone("vlm"), setting("config.json", vlm_model_name=7)), "no vlm/"),
    "no config": (gone("vlm/config.json"), "no VLM"),
}  # fmt: skip


def ids(cases):
    return [pytest.param(*case, id=name.replace(" ", "-")) for name, case in cases.items()]


def ends(refused, folder: Path, words: str) -> None:
    """One line with one of the words, and no marker of code that ran."""
    for place in (folder, folder / "vlm"):
        if place.is_dir():
            (place / "own.py").write_text(CODE)
    line = refused(look(folder))
    assert any(word in line for word in words.split("|")), line
    assert not list(folder.parent.rglob("MARKER")) and (str(folder) in line or "tokenizer_processor" in line)


@pytest.mark.parametrize(("spoil", "words"), ids(CONFIGS))
def test_configs(folder, refused, spoil, words):
    spoil(folder)
    ends(refused, folder, words)


@pytest.mark.parametrize(("spoil", "words"), ids(STEPS))
def test_processors(folder, refused, spoil, words):
    spoil(folder)
    ends(refused, folder, words)


@pytest.mark.parametrize(("spoil", "words"), ids(WEIGHTS))
def test_weights(folder, refused, spoil, words):
    spoil(folder)
    ends(refused, folder, words)


@pytest.mark.parametrize(("spoil", "words"), ids(VLM))
def test_vlm_files(folder, refused, spoil, words):
    spoil(folder)
    ends(refused, folder, words)


@pytest.mark.parametrize("file", [PRE, POST])
@pytest.mark.parametrize("named", ["subprocess.Popen", "os.system", "lerobot.processor.DeviceProcessorStep", "x"])
def test_a_class_is_not_called(folder, refused, file, named):
    """LeRobot's own reader would have called it before it looked at what it is."""
    entry = {"class": named, "config": {"args": ["touch", str(folder / "MARKER")]}}
    steps(lambda old: [entry, *old], file)(folder)
    ends(refused, folder, "to be imported and called")
    steps(lambda old: [{**entry, "registry_name": "to_batch_processor"}, *old[1:]], file)(folder)
    ends(refused, folder, "to be imported and called")


def test_code_that_answers_yes_would_have_run(folder, refused):
    """With a file of code in place and "y" on standard input, as `yes | burnish` gives it."""
    (folder / "vlm/own.py").write_text(
        CODE + "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    setting("vlm/tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")(folder)
    line = refused(look(folder))
    assert "code of its own" in line or "transformers' own" in line
    assert not list(folder.parent.rglob("MARKER"))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_is_never_rendered(folder, accepted, place):
    marker = folder / "MARKER"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}{{ raise_exception('x') }}"
    if place.endswith(".jinja"):
        (folder / "vlm" / place).write_text(template)
    else:
        content = json.loads((folder / "vlm" / place).read_text()) if (folder / "vlm" / place).exists() else {}
        (folder / "vlm" / place).write_text(json.dumps({**content, "chat_template": template}))
    accepted(look(folder), "forward passes")
    assert not marker.exists()


PI0 = {
    "sizes": (lambda c: c["gemma_2b"].update(width=10**9), "width"),
    "layers": (lambda c: c["gemma_300m"].update(depth=-1), "depth"),
    "words": (lambda c: c.update(vocab_size=10**9), "vocab_size"),
    "many words": (lambda c: c.update(vocab_size=9_000_000), "numbers"),
    "a part missing": (lambda c: c.pop("vision") and None, "vision"),
    "another part": (lambda c: c["vision"].update(backend="x"), "vision"),
    "a list": (lambda c: [], "a list"),
}


@pytest.mark.parametrize(("change", "words"), ids(PI0))
def test_sizes_of_a_tiny_pi0(tiny_pi0, tmp_path, refused, change, words):
    folder = Path(shutil.copytree(tiny_pi0, tmp_path / "policy"))
    content = json.loads((folder / "tiny.json").read_text())
    changed = change(content)
    (folder / "tiny.json").write_text(json.dumps(content if changed is None else changed))
    ends(refused, folder, words)


def test_a_whole_pi0_is_not_built_for_a_small_file(tiny_pi0, tmp_path, refused):
    folder = Path(shutil.copytree(tiny_pi0, tmp_path / "policy"))
    (folder / "tiny.json").unlink()
    ends(refused, folder, "numbers")
    shutil.rmtree(folder / "tokenizer")
    ends(refused, folder, "no tokenizer/")


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "cuda:-1", "cpu;x"])
def test_devices(folder, refused, device):
    refused([*look(folder), "--device", device], "device")


def test_names_that_are_no_folder(tmp_path, refused):
    refused(look("owner/some_policy"), "not fetched", "hf download owner/some_policy --local-dir some_policy")
    refused(look(tmp_path / "nothing"), "no policy at")
    refused(look(tmp_path), "no config.json")
    (tmp_path / "file").write_text("x")
    refused(look(tmp_path / "file"), "no policy at")


def test_empty_cameras_alone_are_no_cameras(folder, refused):
    edit(folder / "config.json", lambda content: content.update(input_features={
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 32, 32]},
        "observation.state": content["input_features"]["observation.state"],
    }))  # fmt: skip
    assert "lacks a camera" in refused(look(folder))


def test_a_step_of_one_type_names_files_inside_the_folder_alone(folder):
    """Such a step takes its options as they are, and may ask the hub for what they name."""
    for name in ("owner/repo", "~/model", "/etc", ".."):
        with pytest.raises(BurnishError, match="outside the folder"):
            pipelines._local({"processor_name": name}, folder, "a step")
    shutil.copytree(folder / "vlm", folder / "processor_name")
    kept = {"mode": "plain", "count": 3}
    found = pipelines._local({"processor_name": "owner/repo", **kept}, folder, "a step")
    assert found == {"processor_name": str(folder / "processor_name"), **kept}
    shutil.move(folder / "processor_name", folder.parent / "elsewhere")
    (folder / "processor_name").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BurnishError, match="outside"):
        pipelines._local({"processor_name": "owner/repo"}, folder, "a step")
