"""The prompt of OpenVLA, and its tokenizer, read from tokenizer.json alone: no class that a folder names is made."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.reading import MOST_BYTES, read_object, regular_file
from burnish.policies.pretrained import foreign

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY = "▁"
"""Llama's token of an empty word (29871): it stands between the colon and the first action, as in training."""
TOKENIZER, SPECIAL = "tokenizer.json", "tokenizer_config.json"
MOST_TOKENS = 1024
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
_WIDE = re.compile(rb'"\s*:\s*(\d{8,})\s*[,}]')
"""A token id for which the tokenizer would make room up to it."""


def read_tokenizer(folder: Path) -> Any:
    """transformers' fast tokenizer of a folder; raises BurnishError where it is missing, damaged, or no Llama's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = regular_file(folder / TOKENIZER, folder, MOST_BYTES)
    if wide := _WIDE.search(path.read_bytes()):
        raise BurnishError(f"{path} has the number {wide[1].decode()[:20]}", "token ids of up to 7 digits")
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
    """Prompts of B instructions: ids long [B, S] and mask bool [B, S], padded on the left, without <s>.

    Raises:
        BurnishError: an instruction of over `MOST_TOKENS` tokens.
    """
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
