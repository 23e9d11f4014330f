"""A published OpenVLA folder: read whole, and written again so that it and its other readers load it.

    config.json, dataset_statistics.json         model_type openvla, norm_stats, and our settings under "burnish"
    model.safetensors, or shards with an index   the published names
    action_head.safetensors, proprio_projector.safetensors   of OFT, see `burnish weights convert`
    tokenizer, image processor                   kept as they are, byte for byte

Code that a folder brings (`auto_map`) is carried along with the other files, and never imported. The tokenizer is read
from tokenizer.json alone: no class that a folder names is made.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.reading import MOST_BYTES, read_object, regular_file
from burnish.core.seeding import seeded
from burnish.policies import tensors
from burnish.policies.keys import CONFIG, INDEX, WEIGHTS
from burnish.policies.openvla.configuration import IMAGE_PROCESSOR, STATISTICS, OpenVLAConfig
from burnish.policies.openvla.network import HEADS, OpenVLANet
from burnish.policies.pretrained import check_ids, foreign
from burnish.policies.sizes import check_fits

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY = "▁"
"""Llama's token of an empty word (29871): it stands between the colon and the first action, as in training."""
TOKENIZER, SPECIAL = "tokenizer.json", "tokenizer_config.json"
MOST_TOKENS = 1024
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}


def read_tokenizer(folder: Path) -> Any:
    """transformers' fast tokenizer of a folder; raises BurnishError where it is missing, damaged, or no Llama's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = regular_file(folder / TOKENIZER, folder, MOST_BYTES)
    check_ids(path)
    named = read_object(folder / SPECIAL, folder) if (folder / SPECIAL).is_file() else {}
    special = {}
    for role, usual in _SPECIAL.items():
        token = named.get(role, usual)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise BurnishError(f"{folder / SPECIAL}: {role} is {str(token)[:60]}", "a token")
        special[role] = token
    with foreign(f"{path} cannot be read", "a tokenizer of the tokenizers library"):
        found = Tokenizer.from_file(str(path))
        found.no_padding()
        found.no_truncation()
        known = found.get_vocab()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, **special)
    missing = [token for token in (*special.values(), EMPTY) if token not in known]
    if missing:
        raise BurnishError(f"{path} has no token {missing[0]!r}", "a Llama tokenizer with OpenVLA's padding token")
    return tokenizer


def encode(tokenizer: Any, instructions: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts of B instructions: ids long [B, S] and mask bool [B, S], padded on the left, without <s>."""
    texts = [PROMPT.format(instruction=instruction.lower()) for instruction in instructions]
    empty = tokenizer.convert_tokens_to_ids(EMPTY)
    rows = tokenizer(texts, add_special_tokens=False, padding=False, return_attention_mask=False)["input_ids"]
    rows = [row if row and row[-1] == empty else [*row, empty] for row in rows]
    width = max(map(len, rows))
    if width > MOST_TOKENS:
        raise BurnishError(f"an instruction of {width} tokens", f"at most {MOST_TOKENS}")
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


KEPT = (TOKENIZER, SPECIAL, IMAGE_PROCESSOR, "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "processor_config.json", "generation_config.json")  # fmt: skip
_MOST_KEPT, _MOST_CODE = 64 * 2**20, 2**20
_UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Computed from the config; older writers stored it."""


def kept_files(folder: Path, raw: dict[str, Any]) -> dict[str, bytes]:
    """Contents by name of the folder's small files, those of the code that `auto_map` names among them."""
    names = [name for name in KEPT if (folder / name).exists()]
    found = {name: regular_file(folder / name, folder, _MOST_KEPT).read_bytes() for name in names}
    named = raw.get("auto_map")
    for target in named.values() if isinstance(named, dict) else ():
        module = target.partition(".")[0] if isinstance(target, str) else ""
        path = folder / f"{module}.py"
        if re.fullmatch(r"\w+", module) and path.is_file():
            found[path.name] = regular_file(path, folder, _MOST_CODE).read_bytes()
    return found


def build(config: OpenVLAConfig, folder: Path | None = None) -> nn.Module:
    """The network in its type: with the weights of `folder`, or with random ones from torch's generator."""
    dtype = getattr(torch, config.settings.dtype)
    if folder is None:
        return OpenVLANet(config).to(dtype)
    check_fits({"text_config": config.text.to_dict()}, tensors.size(folder), 0, str(folder / CONFIG))
    with torch.device("meta"), foreign(f"{folder / CONFIG} describes no network", "sizes that go together"):
        network = OpenVLANet(config).to(dtype)
    network.to_empty(device="cpu")
    rotary = network.text_model.rotary_emb
    network.text_model.rotary_emb = type(rotary)(config.text)  # its table is no weight
    _load(network, folder, config)
    return network


def _load(network: nn.Module, folder: Path, config: OpenVLAConfig) -> None:
    state = {name: tensor for name, tensor in tensors.read_weights(folder).items() if not _UNUSED.search(name)}
    heads = [name for name in HEADS if name in dict(network.named_children())]
    backbone = {name: child for name, child in network.named_children() if name not in HEADS}
    tensors.load_tensors(
        nn.ModuleDict(backbone), state, str(folder / (INDEX if not (folder / WEIGHTS).exists() else WEIGHTS))
    )
    for name in heads:
        path = folder / f"{name}.safetensors"
        if path.exists():
            state = tensors.read_file(path, folder)
            odd = next((key for key, own in network.get_submodule(name).state_dict().items()
                        if key in state and own.shape != state[key].shape), None)  # fmt: skip
            if odd is not None:
                raise BurnishError(f"{path} is the head of another robot ({odd} is {tuple(state[odd].shape)})",
                                   f"one for {config.action_dim} actions and {config.settings.state_dim} states",
                                   "a plain OpenVLA, whose new head comes from the override head=l1")  # fmt: skip
            tensors.load_tensors(network.get_submodule(name), state, str(path))
        else:
            _start(network.get_submodule(name), config.settings.init_seed)


def _start(head: nn.Module, seed: int) -> None:
    """torch's own start of a head that is new."""
    with seeded(seed):
        for part in head.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()


def check_heads(folder: Path, config: OpenVLAConfig, stored: dict[str, Any]) -> None:
    """Raise BurnishError where a folder's heads are pickled, or not those that its own settings promise."""
    pickled = sorted(folder.glob("action_head*.pt")) + sorted(folder.glob("proprio_projector*.pt"))
    if pickled and not (folder / "action_head.safetensors").exists():
        raise BurnishError(f"{folder} keeps OFT's heads pickled ({pickled[0].name})", "heads in safetensors",
                           f"burnish weights convert {folder} {folder}-converted")  # fmt: skip
    promised = [name for name, on in (("action_head", stored.get("head") == "l1"),
                                      ("proprio_projector", stored.get("proprio") is True)) if on]  # fmt: skip
    used = {"action_head": config.settings.head == "l1", "proprio_projector": config.settings.proprio}
    for name in promised:
        if used[name] and not (folder / f"{name}.safetensors").exists():
            raise BurnishError(f"no {name}.safetensors in {folder}", "the head that its config.json promises")


def write(folder: Path, config: OpenVLAConfig, kept: dict[str, bytes], state: Mapping[str, Tensor],
          dtype: torch.dtype | None) -> None:  # fmt: skip
    """Write the folder; `state` are the network's tensors."""
    raw = config.stored()
    if not any(name.endswith(".py") for name in kept):
        raw.pop("auto_map", None)
    write_json(folder / CONFIG, raw)
    write_json(folder / STATISTICS, raw["norm_stats"])
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("", *HEADS)}
    for name in state:  # once each: it may be a sharded one that is gathered as it is asked for
        head, _, rest = name.partition(".")
        parts[head if head in HEADS else ""][rest if head in HEADS else name] = state[name]
    tensors.write_weights(folder, parts.pop(""), dtype)
    for name, part in parts.items():
        if part:
            cast = {key: tensor.to(dtype or tensor.dtype).detach().cpu().contiguous() for key, tensor in part.items()}
            tensors.check_finite(cast, "the policy to store")
            save_file(cast, folder / f"{name}.safetensors", metadata={"format": "pt"})
    tensors.share_mode(folder)
