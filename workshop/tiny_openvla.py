"""A small OpenVLA or OpenVLA-OFT with random weights, in the layout that its authors publish."""

import json
from pathlib import Path
from typing import Any

from burnish.core.seeding import seeded
from burnish.policies.openvla.configuration import OWN, read_config
from burnish.policies.openvla.files import KEPT, build, read_tokenizer
from burnish.policies.openvla.policy import OpenVLA

WORDS = (
    "In", "Out", "What", "action", "should", "the", "robot", "take", "to", "pick", "up", "put", "red", "green", "blue",
    "yellow", "cube", "ball", "bowl", "plate", "on", "open", "drawer", "push", "block", "left", "right", "of", "and",
    "then", "Question", "Answer", "colour", "is", "how", "many", "are", "there", "yes", "no",
)  # fmt: skip
TOWERS = [
    {"embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}, {"embed_dim": 48, "depth": 3, "num_heads": 3},
]  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 3, "pad_token_id": 704,
}  # fmt: skip
IMAGE_SIZE, PADDING = 28, 64


def write_tokenizer(folder: Path, vocabulary: int = 704, empty: int = 0) -> None:
    """Llama's kind of tokenizer: byte pairs with bytes to fall back on, words that begin with "▁", <PAD> beyond.

    Args:
        folder: where tokenizer.json and tokenizer_config.json go.
        vocabulary: tokens without <PAD>; the last 256 are the actions'.
        empty: id of "▁"; 0 takes the next that is free (Llama has 29871).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces: list[str] = []
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for form in (f"▁{word}", word):
            for end in range(2, len(form) + 1):
                if form[:end] not in pieces:
                    pieces.append(form[:end])
                    merges.append((form[: end - 1], form[end - 1]))
    letters = sorted({letter for word in WORDS for letter in word} | set("?:\n.,0123456789"))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    if not empty:
        names.append("▁")
    vocab = {name: i for i, name in enumerate(names)}
    vocab |= {"▁" if i == empty else chr(0x20000 + i): i for i in range(len(names), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>", "<PAD>")])
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in merges]  # as the published file has them
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    told = {**special, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "padding_side": "right", "legacy": False}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def config_json(vocabulary: int, text: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The fields of a published config.json."""
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp", "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure", "image_sizes": [IMAGE_SIZE] * 2, "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": True, "n_action_bins": 256,
        "pad_to_multiple_of": PADDING, "pad_token_id": vocabulary,
        "text_config": {**text, "pad_token_id": vocabulary, "vocab_size": vocabulary + PADDING}, OWN: own,
    }  # fmt: skip


def make_openvla(
    name: str, folder: Path, features: dict[str, Any] | None, stats: dict[str, Any] | None, own: dict[str, Any],
    seed: int, *, norm_stats: dict[str, Any] | None = None, vocabulary: int = 704, empty: int = 0,
) -> Path:  # fmt: skip
    """Write the folder.

    Args:
        name: openvla or openvla_oft (L1 head, and the state by its projector).
        folder: where to write.
        features: LeRobot's; None takes cameras and state from `own` and `stats`.
        stats: LeRobot statistics; None where `norm_stats` are given.
        own: fields of `configuration.Settings`.
        seed: of the weights; the global generator is left as it was.
        vocabulary, empty: of `write_tokenizer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocabulary, empty)
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": "resize-naive", "means": means,
        "stds": stds, "input_sizes": [[3, IMAGE_SIZE, IMAGE_SIZE]] * 2, "interpolations": ["bicubic"] * 2,
        "use_fused_vision_backbone": True,
    }))  # fmt: skip
    heads = {"head": "l1", "proprio": True} if name == "openvla_oft" else {}
    raw = config_json(vocabulary, TEXT, {"towers": TOWERS, **heads, **own})
    raw["norm_stats"] = norm_stats
    config = read_config(folder, raw, {}, features, stats, "the given statistics")
    with seeded(seed):
        network = build(config)
    kept = {file: (folder / file).read_bytes() for file in KEPT if (folder / file).exists()}
    OpenVLA(network, read_tokenizer(folder), kept).save(folder)
    return folder
