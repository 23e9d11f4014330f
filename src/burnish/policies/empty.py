"""A policy that is shapes alone: built from its config, without weights, tokenizer or files, for what counts bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core import renames
from burnish.core.options import home
from burnish.core.reading import read_object
from burnish.core.types import Batch
from burnish.policies.keys import ACTION, CONFIG, STATE, TASK, TOKEN_MASK, TOKENS
from burnish.policies.load import ASSETS, kind_of, resolve
from burnish.policies.wrapper import PolicyWrapper

WORDS = 48
"""Tokens of an instruction where the config of a policy names no limit."""


def empty_policy(path: str, kind: str, overrides: Mapping[str, Any], features: dict[str, Any] | None) -> PolicyWrapper:
    """The policy that a recipe trains. Call it where tensors are fake (see burnish.train.cost).

    Args:
        path: its folder, of which config.json and the files of its VLM are read. Where there is none, LeRobot's own
            sizes of `kind` stand in.
        features: LeRobot PolicyFeatures by key; None keeps those of the folder.
    """
    changes, found = dict(overrides), Path(home(path))
    there = bool(path) and ((found / CONFIG).is_file() or (len(found.parts) == 1 and (ASSETS / found).is_dir()))
    folder = resolve(path) if there else None
    raw = {"type": kind} if folder is None else read_object(folder / CONFIG, folder)
    kind = raw.get("type") or raw.get("model_type")
    old = renames.POLICY_FIELDS.get(kind, {})
    return kind_of(kind).empty(folder, renames.rename(raw, old), renames.rename(changes, old), features, Tokens)


class Tokens:
    """Stands in for a preprocessor: as many text tokens as the policy takes at most, values as they come."""

    def __init__(self, config: Any):
        from lerobot.processor import TokenizerProcessorStep

        step = TokenizerProcessorStep.__new__(TokenizerProcessorStep)
        self.length = getattr(config, "tokenizer_max_length", WORDS)
        step.input_tokenizer = self.tokenizer = _Tokenizer(self.length)
        self.steps = [step]

    def __call__(self, batch: Batch) -> Batch:
        shape = len(batch[STATE]), self.length
        return {**batch, TOKENS: torch.zeros(shape, dtype=torch.long), TOKEN_MASK: torch.ones(shape, dtype=torch.bool)}


class _Tokenizer:
    """Stands in for a tokenizer: every text has as many tokens, all of them the first."""

    bos_token = eos_token = ""
    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * self.length for _ in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_tokens_to_ids(self, _token: str) -> int:
        return 0


def empty_batch(policy: PolicyWrapper, size: int) -> Batch:
    """A training batch of `size` samples as the policy's loss takes it."""
    views: dict[str, Tensor] = {
        key: torch.zeros(size, *policy.config.image_features[key].shape) for key in policy.camera_keys
    }
    return {
        **views, STATE: torch.zeros(size, policy.state_dim), TASK: ["pick it up"] * size,
        ACTION: torch.zeros(size, policy.chunk_size, policy.action_dim),
        "action_is_pad": torch.zeros(size, policy.chunk_size, dtype=torch.bool),
    }  # fmt: skip
