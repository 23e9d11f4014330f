"""Files of a VLM or a tokenizer as the Hugging Face libraries read them: looked at first, then loaded without code.

transformers imports what `auto_map` names (and asks on the terminal first), fetches attention kernels from the hub by
name, follows file names out of the folder and loads adapters' bases from elsewhere. A folder that asks for any of it is
refused before transformers sees it. Chat templates stay text: nothing here renders one.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.core.errors import BurnishError, one_line, out_of_memory
from burnish.core.reading import MOST_BYTES, inside, read_json, read_object, regular_file
from burnish.policies.keys import CONFIG, FAST_FOLDER, VLM_FOLDER
from burnish.policies.sizes import check_fits, check_model_numbers

MOST_FILES = 1000
_BIG = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Read by the libraries alone: plain tables of tokens."""
_WIDE = re.compile(rb'"\s*:\s*(\d{8,})\s*[,}]')
"""A token id for which the tokenizer would make room up to it."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
_CLASSES = {
    "tokenizer_class": r"[A-Z]\w*(Tokenizer|TokenizerFast|Backend)", "processor_class": r"[A-Z]\w*Processor",
    "image_processor_type": r"[A-Z]\w*(ImageProcessor|FeatureExtractor)\w*",
    "feature_extractor_type": r"[A-Z]\w*(ImageProcessor|FeatureExtractor)\w*",
    "video_processor_type": r"[A-Z]\w*VideoProcessor\w*", "model_type": r"[a-z][\w-]*",
    "dtype": r"(torch\.)?(auto|b?float\d+)", "torch_dtype": r"(torch\.)?(auto|b?float\d+)",
}  # fmt: skip
"""Names that the libraries look up among their own classes."""
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_REFUSED = {
    "auto_map": "code of its own", "custom_pipelines": "code of its own", "trust_remote_code": "code of its own",
    "configuration_files": "other files", "fast_tokenizer_files": "other files", "init_inputs": "arguments",
    "use_pretrained_backbone": "weights from elsewhere", "quantization_config": "quantised weights",
}  # fmt: skip


@contextmanager
def foreign(what: str, expected: str, fix: str = "") -> Iterator[None]:
    """Inside, whatever a library raises about the files of others becomes one BurnishError that begins with `what`."""
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself, transformers and LeRobot anything
        if isinstance(error, BurnishError) or out_of_memory(error):
            raise
        raise BurnishError(f"{what}: {one_line(error)}", expected, fix) from error


def check_files(folder: Path) -> None:
    """Raise BurnishError unless every file of a VLM's or tokenizer's folder is harmless to load.

    That is: a regular file inside the folder, of a bounded size (weights aside), and no JSON that names code, classes
    beyond the libraries' own, other places, or sizes out of range.
    """
    root = next((part for part in folder.parents if part.parent.name == "snapshots"), folder)  # the hub's cache
    for count, path in enumerate(sorted(folder.rglob("*"))):
        if count > MOST_FILES:
            raise BurnishError(f"{folder} holds over {MOST_FILES} files", "config, tokenizer and processor of a VLM")
        if path.is_dir() and not path.is_symlink():
            continue
        regular_file(path, root, None if path.suffix in _WEIGHTS else MOST_BYTES)
        if path.name == "adapter_config.json":
            raise BurnishError(f"{path} makes an adapter of the VLM", "the whole VLM", "merge the adapter with peft")
        if path.suffix == ".json" and path.name not in _BIG:
            content = read_json(path, root)
            _check_inert(content, path)
            if path.name == CONFIG:
                check_model_numbers(content, str(path))
        elif path.name in _BIG:
            check_ids(path)


def check_ids(path: Path) -> None:
    """Raise BurnishError for a table of tokens with an id that no vocabulary reaches."""
    if wide := _WIDE.search(path.read_bytes()):
        raise BurnishError(f"{path} has the number {wide[1].decode()[:20]}", "token ids of up to 7 digits")


def _check_inert(content: Any, path: Path) -> None:
    todo = [content]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        if not isinstance(one, dict):
            continue
        todo += one.values()
        for key, value in one.items():
            if key in _REFUSED and value:
                raise BurnishError(f"{path} asks for {_REFUSED[key]} ({key}), which burnish does not load",
                                   "plain config, tokenizer and processor files")  # fmt: skip
            if key in _CLASSES and value is not None and not _named(value, _CLASSES[key]):
                raise BurnishError(f"{path}: {key} is {str(value)[:60]!r}", "the name of one of transformers' own")
            if key.endswith("attn_implementation") and not _plain_attention(value):
                raise BurnishError(f"{path}: {key} is {str(value)[:60]!r}", f"one of {', '.join(_ATTENTION)}")
            if key.endswith("_file") and key != "special_tokens_map_file" and value is not None:
                inside = _named(value, r"[\w.-]+") and (path.parent / value).is_file()
                if not inside:
                    raise BurnishError(f"{path}: {key} is {str(value)[:60]!r}", "a file of the folder itself, by name")


def _named(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _plain_attention(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain_attention(part) for part in value.values())
    return value is None or value in _ATTENTION


def is_hub_name(name: Any) -> bool:
    """Whether a text looks like `owner/name` on the Hugging Face hub, and nothing here goes by it."""
    return _named(name, r"[\w.-]+/[\w.-]+") and ".." not in name and not os.path.exists(name)


def require_inside(folder: Path, name: str, stored: Any) -> Path:
    """`folder`/`name`, with the checked files of its VLM or tokenizer.

    Args:
        stored: what the policy's config names in its place: an absolute path or a hub name.

    Raises:
        BurnishError: there is none (it says what to copy: nothing outside the folder is read), or `check_files`.
    """
    place = inside(folder, name)
    if place.is_dir():
        if name == VLM_FOLDER:
            vlm_config(place)
        elif name != FAST_FOLDER:
            check_files(place)
        else:  # no library reads anything of it, but all of it is copied
            for file in sorted(place.iterdir()):
                regular_file(file, folder, MOST_BYTES)
        return place
    fix = f"copy config, tokenizer and processor of its VLM into {shlex.quote(str(place))}"
    if isinstance(stored, str) and stored and os.path.isdir(stored):  # Path's own fails where one may not look
        fix = f"cp -rL {shlex.quote(str(Path(stored).absolute()))} {shlex.quote(str(place))}"
    elif is_hub_name(stored):
        fix = f"hf download {stored} --include '*.json' --local-dir {shlex.quote(str(place))}"
    raise BurnishError(f"no {name}/ in {folder} (it names '{stored or ''}', and nothing outside the folder is read)",
                       "the files of its language model and tokenizer inside", fix)  # fmt: skip


@contextmanager
def no_remote_code(tokenizer: Path | None = None) -> Iterator[None]:
    """Inside, transformers neither runs a folder's code nor asks about it, and nothing is fetched, also where LeRobot
    asks for it.

    Args:
        tokenizer: folder that LeRobot's tokenizer step takes whatever name it is given; None leaves the step alone.
    """
    from unittest.mock import patch

    from huggingface_hub import constants
    from lerobot.processor import tokenizer_processor
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> None:
        raise BurnishError("a model that wants to run code of its own", "a model of the libraries' own")

    code = {"TIME_OUT_REMOTE_CODE": 0, "get_cached_module_file": refuse, "get_class_in_module": refuse}
    with patch.multiple(dynamic_module_utils, **code), patch.object(constants, "HF_HUB_OFFLINE", True):
        if tokenizer is None:
            yield
            return
        with patch.object(tokenizer_processor, "AutoTokenizer") as auto:
            auto.from_pretrained = lambda *_, **options: load_tokenizer(tokenizer, **options)
            yield


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of a folder; of `options` only `add_bos_token` and `add_eos_token` count."""
    from transformers import AutoTokenizer

    check_files(folder)
    fix = f"put the tokenizer's files into {folder}"
    with foreign(f"the tokenizer in {folder} cannot be loaded", "a tokenizer that transformers can load", fix):
        chosen = {name: options[name] for name in ("add_bos_token", "add_eos_token") if name in options}
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **chosen)


def vlm_config(folder: Path) -> Any:
    """The transformers config of a VLM folder, whose files are checked."""
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / CONFIG).exists():
        found = str(folder)
        fix = f"hf download {found} --local-dir {folder.name}" if is_hub_name(found) else ""
        raise BurnishError(f"no VLM in {found}", f"a folder with {CONFIG}", fix)
    check_files(folder)
    read_object(folder / CONFIG)
    with foreign(f"the VLM's {CONFIG} in {folder} cannot be read", "a config of transformers"):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def check_size(config: Any, num_bytes: int, folder: Path, layers: int = 0) -> None:
    """`check_fits` for what `vlm_config` returns of `folder`."""
    check_fits(config.to_dict(), num_bytes, layers, str(folder / CONFIG))


def load_vlm(folder: Path | str, *, weights: bool = True) -> nn.Module:
    """The transformers model of a VLM folder in float32, with its own weights or random ones."""
    from transformers import AutoModelForImageTextToText

    folder = Path(folder)
    config = vlm_config(folder)
    if weights:
        check_size(config, sum(path.stat().st_size for path in folder.glob("*.safetensors")), folder)
    with foreign(f"the VLM in {folder} cannot be loaded", "an image-text-to-text model with safetensors weights"):
        if weights:
            return AutoModelForImageTextToText.from_pretrained(
                str(folder), config=config, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
                use_safetensors=True,
            )  # fmt: skip
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
