"""Small random-weight VLMs and policies, made on the spot: for tests, for docs, and as the start of a base model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import seeded
from burnish.policies import create_policy
from burnish.policies import folder as folders
from burnish.policies.keys import ACTION, FAST_FOLDER, IMAGES, STATE
from burnish.policies.pi import PI_SIZES, Pi, small_pi
from burnish.policies.pi0_fast import Pi0Fast, local_tokenizers
from burnish.policies.pipelines import new_processors

IMAGE_TOKEN = "<image>"
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    IMAGE_TOKEN,
    "<end_of_utterance>",
    "<bos>",
]
_RARE = 0x4E00
"""Characters from here on are no byte's, so that no text makes their tokens."""
NANO_TEXTS = (
    "Question: what colour is the cube?\nAnswer: red",
    "Question: how many cubes are there?\nAnswer: 2",
    "Question: is the ball left of the bowl?\nAnswer: yes",
    "pick up the red cube",
    "put the green ball on the plate",
    "open the drawer",
    "push the blue block to the left",
    "no yellow purple right",
)
NANO_VISION = {
    "model_type": "smolvlm_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
NANO_TEXT = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
}  # fmt: skip
_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int, split_digits: bool = True, spare: int = 0) -> Any:
    """Train a byte-level BPE tokenizer with SmolVLM's special tokens.

    Args:
        texts: the training texts.
        vocab_size: upper limit; 264 (bytes and special tokens) is the least that makes sense.
        split_digits: spell numbers digit by digit; otherwise a frequent number becomes one token.
        spare: ids beyond `vocab_size` that no text makes, after those of single bytes and before those of words.

    Returns:
        A transformers PreTrainedTokenizerFast with eos `<end_of_utterance>` and pad `<|im_end|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + spare,
        special_tokens=_SPECIAL,
        show_progress=False,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), *map(chr, range(_RARE, _RARE + spare))],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": IMAGE_TOKEN,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )


def build_vlm(folder: Path | str, *, seed: int = 0, **files: Any) -> Path:
    """Write a SmolVLM folder with random float32 weights, tokenizer and processor.

    `AutoModelForImageTextToText.from_pretrained(folder)` loads it. An image becomes
    (image_size / patch_size / scale_factor)^2 tokens. The other arguments are those of `vlm_files`.

    Args:
        folder: where to write; made if missing.
        seed: of the weights; the global generator is left as it was.

    Returns:
        The folder.
    """
    from transformers import SmolVLMForConditionalGeneration

    config = vlm_files(folder, **files)
    with seeded(seed):
        model = SmolVLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    return Path(folder)


def vlm_files(
    folder: Path | str,
    *,
    texts: Iterable[str] = NANO_TEXTS,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    vocab_size: int = 384,
    rows: int = 0,
    scale_factor: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    split_digits: bool = True,
) -> Any:
    """Write config, tokenizer and processor of a SmolVLM into a folder, and no weights.

    Args:
        folder: where to write; made if missing.
        texts: what the tokenizer is trained on.
        vision: fields of SmolVLMVisionConfig that differ from the nano ones.
        text: fields of LlamaConfig that differ from the nano ones. Keep rope_theta at 10000: SmolVLA's joint forward
            has that number built in, and another one would make the language verb and the policy disagree.
        vocab_size: upper limit of the vocabulary.
        rows: of the word embeddings; 0 means as many as the tokenizer has ids.
        scale_factor: pixel shuffle of the connector, on each side.
        image_size, patch_size: pixels.
        split_digits: see `build_tokenizer`.

    Returns:
        The config.
    """
    from transformers import SmolVLMConfig

    tokenizer = build_tokenizer(texts, vocab_size, split_digits)
    config = SmolVLMConfig(
        vision_config={**NANO_VISION, "image_size": image_size, "patch_size": patch_size, **(vision or {})},
        text_config={
            **NANO_TEXT,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **(text or {}),
            "vocab_size": rows or len(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        scale_factor=scale_factor,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_processor(tokenizer, config, image_size).save_pretrained(folder)
    return config


def build_processor(tokenizer: Any, config: Any, image_size: int) -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    size = {"longest_edge": image_size}
    image = SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    video = SmolVLMVideoProcessor(
        size=size, max_image_size=size, video_sampling={"fps": 1, "max_frames": 4}, num_frames=4, fps=1
    )
    patches = config.vision_config.image_size // config.vision_config.patch_size
    tokens = (patches // config.scale_factor) ** 2
    return SmolVLMProcessor(image, tokenizer, video, image_seq_len=tokens, chat_template=_CHAT)


def default_statistics(state_dim: int, action_dim: int) -> dict[str, dict[str, torch.Tensor]]:
    """LeRobot statistics that are neither zero nor one, so that a forgotten normalisation shows."""

    def one(width: int) -> dict[str, torch.Tensor]:
        mean, spread = torch.linspace(-0.4, 0.6, width), torch.linspace(0.5, 1.5, width)
        return {
            "mean": mean, "std": spread, "min": mean - 3 * spread, "max": mean + 3 * spread,
            "q01": mean - 2 * spread, "q99": mean + 2 * spread, "q10": mean - spread, "q90": mean + spread, "q50": mean,
        }  # fmt: skip

    return {STATE: one(state_dim), ACTION: one(action_dim)}


def make_tiny(
    type: str,
    folder: Path | str,
    *,
    cameras: Sequence[str] = ("top",),
    state_dim: int = 7,
    action_dim: int = 7,
    image_size: int = 32,
    dataset_stats: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a policy folder with small random weights, which `load_policy` loads.

    LeRobot itself loads a tiny smolvla as it is; for pi0 and pi05 it needs `pi_sizes.small_pi`.

    Args:
        type: one of KINDS.
        folder: where to write.
        cameras: names of the cameras.
        state_dim, action_dim: at most 8 unless `overrides` raises max_state_dim and max_action_dim.
        image_size: pixels of the images in the declared features.
        dataset_stats: LeRobot statistics; made up when not given.
        overrides: fields of the LeRobot config.
        seed: of the weights; the global generator is left as it was.

    Returns:
        The folder.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature

    features = {
        **{f"{IMAGES}{c}": PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size)) for c in cameras},
        STATE: PolicyFeature(FeatureType.STATE, (state_dim,)),
        ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,)),
    }
    stats = dataset_stats or default_statistics(state_dim, action_dim)
    config = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8, **(overrides or {})}
    folder = Path(folder)
    if type not in KINDS:
        raise BurnishError(f"a tiny policy of type '{type}'", f"one of {', '.join(KINDS)}")
    KINDS[type](type, folder, features, stats, config, seed)
    return folder


def _smolvla(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    with TemporaryDirectory() as vlm:
        build_vlm(vlm, seed=seed)
        create_policy(vlm, features, stats, {"num_steps": 3, **overrides}, type=name, generator_seed=seed).save(folder)


def _discrete(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    fields = {"bins": 16, **overrides}
    del fields["max_action_dim"]
    with TemporaryDirectory() as vlm:
        build_vlm(vlm, seed=seed)
        create_policy(vlm, features, stats, fields, type=name, generator_seed=seed).save(folder)


def _openvla(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    from workshop.tiny_openvla import make_openvla

    own = {key: value for key, value in overrides.items() if key not in ("max_state_dim", "max_action_dim")}
    make_openvla(name, folder, features, stats, own, seed)


def _pi(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    from lerobot.processor import TokenizerProcessorStep

    tokenizer = build_tokenizer([*NANO_TEXTS, "Task: State: Action: 0 1 2 3"], 384)
    tokenizer_folder = (folder / Pi.tokenizer_folder).absolute()
    tokenizer.save_pretrained(tokenizer_folder)
    sizes = {**PI_SIZES, "vocab_size": len(tokenizer)}
    config = folders.decode_config(
        {"type": name, "num_inference_steps": 3, **_PI_FIELDS, **overrides}, "the tiny config", features, "cpu"
    )
    with small_pi(sizes, tokenizer_folder):
        policy = folders.build(config, seed)
        pre, post = new_processors(config, stats)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in policy.named_parameters():
        if ".dense." in parameter_name:  # adaptive norms start as zero gates, which would shut images and text out
            with torch.no_grad():
                parameter.normal_(0.0, 0.5, generator=generator)
    next(s for s in pre.steps if isinstance(s, TokenizerProcessorStep)).tokenizer_name = str(tokenizer_folder)
    Pi(policy, pre, post, sizes=sizes).save(folder)


def _pi0_fast(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    spare, words = 400, 384
    tokenizer = build_tokenizer([*NANO_TEXTS, "Task: State: Action: | 0 1 2 3"], words, spare=spare)
    tokenizer.save_pretrained(folder / Pi.tokenizer_folder)
    build_fast(folder / FAST_FOLDER)
    sizes = {**PI_SIZES, "vocab_size": len(tokenizer)}
    last_spare = tokenizer.convert_tokens_to_ids(chr(_RARE + spare - 1))
    raw = {
        "type": name, "max_action_tokens": 96, "max_decoding_steps": 24, **_PI_FIELDS,
        "fast_skip_tokens": tokenizer.vocab_size - 1 - last_spare, **overrides,
        "text_tokenizer_name": str((folder / Pi.tokenizer_folder).absolute()),
        "action_tokenizer_name": str((folder / FAST_FOLDER).absolute()),
    }  # fmt: skip
    config = folders.decode_config(raw, "the tiny config", features, "cpu")
    with local_tokenizers(config), small_pi(sizes, image_size=config.image_resolution[0]):
        policy = folders.build(config, seed)
        pre, post = new_processors(config, stats, tokenizer=folder / Pi.tokenizer_folder)
    Pi0Fast(policy, pre, post, sizes=sizes).save(folder)


def build_fast(folder: Path | str, vocab_size: int = 300) -> Path:
    """Write the two files of a FAST tokenizer that burnish reads: byte pairs over characters, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(["".join(chr(i) for i in range(200)), "ddddeeee" * 9], trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs.save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text(json.dumps({"scale": 10, "min_token": -100}))
    return folder


def _lerobot(name: str, folder: Path, features: dict, stats: dict, overrides: dict, seed: int) -> None:
    """A type that LeRobot makes of its config alone; a chunk is as long as its kind of network allows."""
    length, executed = overrides["chunk_size"], overrides["n_action_steps"]
    kept = {k: v for k, v in overrides.items() if k not in ("chunk_size", "n_action_steps", "max_state_dim",
                                                            "max_action_dim")}  # fmt: skip
    fields: dict[str, dict[str, Any]] = {
        "act": {"chunk_size": length, "n_action_steps": executed, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32,
                "n_encoder_layers": 3, "latent_dim": 4, "n_vae_encoder_layers": 1},
        "diffusion": {"horizon": 8 * -(-length // 8), "n_action_steps": min(executed, 4), "down_dims": [16, 32, 32],
                      "n_groups": 4, "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4,
                      "num_train_timesteps": 10, "num_inference_steps": 2, "use_group_norm": True,
                      "drop_n_last_frames": 1},
        "vqbet": {"n_obs_steps": 2, "n_action_pred_token": 2, "action_chunk_size": 4, "crop_shape": None,
                  "vqvae_embedding_dim": 16, "vqvae_enc_hidden_dim": 16, "gpt_block_size": 32, "gpt_input_dim": 32,
                  "gpt_output_dim": 32, "gpt_n_layer": 2, "gpt_n_head": 2, "gpt_hidden_dim": 32,
                  "spatial_softmax_num_keypoints": 4, "use_group_norm": True},
    }  # fmt: skip
    create_policy("", features, stats, {**fields[name], **kept}, type=name, generator_seed=seed).save(folder)


_PI_FIELDS = {"image_resolution": [28, 28], "push_to_hub": False, "tokenizer_max_length": 96}
KINDS = {
    "smolvla": _smolvla, "pi0": _pi, "pi05": _pi, "pi0_fast": _pi0_fast, "burnish_discrete": _discrete,
    "act": _lerobot, "diffusion": _lerobot, "vqbet": _lerobot, "openvla": _openvla, "openvla_oft": _openvla,
}  # fmt: skip
"""How a tiny policy of each type is made."""
