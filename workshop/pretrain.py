"""`python -m workshop pretrain`: a small vision-language model from scratch on scene questions.

This is ordinary language modelling on a transformers model, so transformers' Trainer runs it; everything after it
(demonstrations, methods) goes through burnish's own loop.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.recipe import find_recipe
from burnish.core.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments


@dataclass
class PretrainConfig:
    output: str = "runs/base_vlm"
    questions: str = "data/base_questions"
    vision: dict[str, Any] = field(default_factory=dict)
    """Fields of SmolVLMVisionConfig."""
    text: dict[str, Any] = field(default_factory=dict)
    """Fields of LlamaConfig."""
    image_size: int = 96
    patch_size: int = 12
    scale_factor: int = 2
    vocab_size: int = 1024
    extra_texts: list[str] = field(default_factory=list)
    """Sentences the tokenizer should also know, such as the instructions of other simulators."""
    vision_steps: int = 1500
    """Steps of the first phase (see pretrain_vision), which trains vision tower and connector alone."""
    grounding_steps: int = 1000
    """Steps of the second phase (see pretrain_grounding), in which names learn to point."""
    steps: int = 4000
    """Steps of language modelling on packed questions; 0 leaves them to the joint training that follows."""
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    pointing_turns: int = 3
    """`where` questions packed after each image."""
    other_turns: int = 2
    """Questions of other kinds packed after each image."""
    seed: int = 0
    save_every: int = 500


class PackedQuestions:
    """Each item is one image with several of its questions, drawn again in every epoch."""

    def __init__(self, config: PretrainConfig):
        from burnish.data.questions import open_questions

        self.config = config
        self.questions = open_questions(config.questions)
        self.by_image: list[list[dict]] = [[] for _ in self.questions.images]
        for entry in self.questions.entries:
            self.by_image[entry["image"]].append(entry)
        self._visits = np.zeros(len(self.by_image), np.int64)

    def __len__(self) -> int:
        return len(self.by_image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        visit = self._visits[index]
        self._visits[index] += 1
        rng = np.random.default_rng(derive_seed("pretrain", self.config.seed, index, visit))
        rows = self.by_image[index]
        turns = []
        for pointing, count in ((True, self.config.pointing_turns), (False, self.config.other_turns)):
            some = [r for r in rows if (r["kind"] == "where") == pointing]
            turns += [some[i] for i in rng.permutation(len(some))[:count]]
        turns = [turns[i] for i in rng.permutation(len(turns))]
        return {
            "index": index,
            "image": self.questions.images[index],
            "question": [t["question"] for t in turns],
            "answer": [t["answer"] for t in turns],
            "jitter": rng.uniform(0.85, 1.15, 3).astype(np.float32),
        }


def _train_grounding(config: PretrainConfig, model: Any, tokenizer: Any, data: PackedQuestions) -> list[dict]:
    """The second phase; returns its log."""
    import torch
    from transformers import Trainer

    from workshop.pretrain_grounding import GroundingPhase, match_rms, name_texts
    from workshop.pretrain_vision import located_names

    located = [located_names(rows) for rows in data.by_image]
    indices = [i for i, scene in enumerate(located) if scene]
    match_rms(model, _pixels([data[i] for i in indices[:32]]))
    seen = 0

    def prepare(items: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        rng = np.random.default_rng(derive_seed("grounding", config.seed, seen))
        items = [i for i in items if located[i["index"]]]
        texts = [name_texts(located[i["index"]], tokenizer, rng) for i in items]
        width, names = max(len(t[0]) for t in texts), max(len(t[1]) for t in texts)
        return {
            "pixels": _pixels(items),
            "input_ids": torch.tensor([t[0] + [tokenizer.pad_token_id] * (width - len(t[0])) for t in texts]),
            "attention_mask": torch.tensor([[1] * len(t[0]) + [0] * (width - len(t[0])) for t in texts]),
            "names": torch.tensor([t[1] + [-1] * (names - len(t[1])) for t in texts]),
            "points": torch.tensor([t[2] + [(0.0, 0.0)] * (names - len(t[2])) for t in texts], dtype=torch.float32),
            "scaled": torch.tensor(bool(rng.random() < 0.5)),
        }

    phase = GroundingPhase(model)
    trainer = Trainer(phase, _arguments(config, config.grounding_steps), train_dataset=data, data_collator=prepare)
    trainer.train()
    return trainer.state.log_history


def collate(items: list[dict[str, Any]], tokenizer: Any, num_image_tokens: int) -> dict[str, Any]:
    """Model inputs of a batch: images in [-1, 1] with jittered colour balance, packed turns as labels."""
    from burnish.policies.vqa import encode
    from workshop.tiny import IMAGE_TOKEN

    encoded = encode(
        tokenizer, IMAGE_TOKEN, num_image_tokens, [i["question"] for i in items], [i["answer"] for i in items]
    )
    return {**encoded._asdict(), "pixel_values": _pixels(items)[:, None]}


def _pixels(items: list[dict[str, Any]]) -> "Tensor":
    """[B, 3, H, W] in [-1, 1], with jittered colour balance."""
    import torch

    images = torch.from_numpy(np.stack([i["image"] for i in items])).permute(0, 3, 1, 2).float() / 255
    jitter = torch.from_numpy(np.stack([i["jitter"] for i in items]))[:, :, None, None]
    return (images * jitter).clamp(0, 1) * 2 - 1


def sincos_2d(side: int, width: int) -> "Tensor":
    """[side * side, width] sine and cosine of row and column.

    The usual start of std 0.02 is a twentieth of what a patch contributes, and pointing then waits long for the
    position to be heard.
    """
    import torch

    frequencies = torch.pi * torch.arange(1, width // 4 + 1) / (width // 4) * side / 2
    angles = torch.arange(side)[:, None] / side * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return 0.5 * torch.cat([rows, columns], -1).reshape(side * side, -1)


def pretrain(config: PretrainConfig) -> Path:
    """Train and write the VLM folder `<output>/vlm`, which AutoModelForImageTextToText loads."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer

    from workshop.tiny import build_vlm

    data = PackedQuestions(config)
    if data.questions.images.shape[1] != config.image_size:
        raise BurnishError(
            f"{config.questions} holds images of {data.questions.images.shape[1]} px", f"{config.image_size} px"
        )
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in data.questions.entries[:100_000]]
    folder = build_vlm(
        Path(config.output) / "vlm",
        texts=texts + config.extra_texts * 200,
        vision=config.vision,
        text=config.text,
        vocab_size=config.vocab_size,
        scale_factor=config.scale_factor,
        image_size=config.image_size,
        patch_size=config.patch_size,
        split_digits=False,
        seed=config.seed,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    positions = model.model.vision_model.embeddings.position_embedding.weight
    positions.data.copy_(sincos_2d(config.image_size // config.patch_size, positions.shape[1]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = (config.image_size // config.patch_size // config.scale_factor) ** 2
    log = {}
    if config.vision_steps:
        log["vision"] = _train_vision(config, model, tokenizer, data)
        model.save_pretrained(folder)
    if config.grounding_steps:
        log["grounding"] = _train_grounding(config, model, tokenizer, data)
        model.save_pretrained(folder)
    if config.steps:
        trainer = Trainer(
            model, _arguments(config, config.steps), train_dataset=data,
            data_collator=lambda items: collate(items, tokenizer, tokens),
        )  # fmt: skip
        trainer.train()
        log["language"] = trainer.state.log_history
        model.save_pretrained(folder)
    (Path(config.output) / "log.json").write_text(json.dumps(log))
    return folder


def _arguments(config: PretrainConfig, steps: int) -> "TrainingArguments":
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(Path(config.output) / "trainer"), max_steps=steps, learning_rate=config.lr,
        per_device_train_batch_size=config.batch_size, warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine", weight_decay=config.weight_decay, adam_beta2=0.95, max_grad_norm=1.0,
        logging_steps=25, save_steps=config.save_every, save_total_limit=1, seed=config.seed, report_to=[],
        remove_unused_columns=False, dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip


def _train_vision(config: PretrainConfig, model: Any, tokenizer: Any, data: PackedQuestions) -> list[dict]:
    """The first phase; returns its log."""
    import torch
    from transformers import Trainer

    from workshop.pretrain_vision import VisionPhase, grid_targets, located_names

    located = [located_names(rows) for rows in data.by_image]
    words = {w: i for i, w in enumerate(sorted({w for scene in located for names, _, _ in scene for w in names}))}
    phase = VisionPhase(model, [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in words])
    side = config.image_size // config.patch_size
    rng = np.random.default_rng(derive_seed("vision phase", config.seed))

    def prepare(items: list[dict[str, Any]]) -> dict[str, Any]:
        patches = [grid_targets(located[i["index"]], words, side, 1.0) for i in items]
        tokens = [grid_targets(located[i["index"]], words, side // config.scale_factor, 0.6) for i in items]
        return {
            "pixels": _pixels(items),
            "patch_labels": torch.from_numpy(np.stack([labels for labels, _ in patches])),
            "patch_offsets": torch.from_numpy(np.stack([offsets for _, offsets in patches])),
            "token_labels": torch.from_numpy(np.stack([labels for labels, _ in tokens])),
            "word_position": torch.tensor(int(rng.integers(16, 64))),
            "token_offsets": torch.from_numpy(np.stack([offsets for _, offsets in tokens])),
        }

    trainer = Trainer(phase, _arguments(config, config.vision_steps), train_dataset=data, data_collator=prepare)
    trainer.train()
    return trainer.state.log_history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop pretrain --config recipes/base/vlm_small.yaml --steps=4000"
    parser.add_argument("--config", required=True, help="recipe file; any field can follow as --field=value")


def main(args: argparse.Namespace) -> int:
    import draccus

    config = draccus.parse(PretrainConfig, config_path=find_recipe(args.config), args=args.overrides)
    folder = pretrain(config)
    print(f"VLM folder: {folder}")
    return 0
