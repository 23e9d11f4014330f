"""pi0-FAST: PaliGemma reads images, instruction and binned state, and writes FAST tokens until it stops.

Its prompt is LeRobot's ("Task: ..., State: ...;"), its answer <bos>"Action: "FAST tokens"|"<eos>. FAST's ids take the
places of PaliGemma's rarest tokens, counted from the end of its vocabulary.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Chunk, Draws, PolicyLoss
from burnish.policies import folder as folders
from burnish.policies.base import Stage, lacks
from burnish.policies.discrete.tokenizers import Fast
from burnish.policies.draws import drawn, seeds
from burnish.policies.keys import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, FAST_FOLDER, TASK, TOKEN_MASK, TOKENS
from burnish.policies.load import POLICIES
from burnish.policies.pi import PaliGemmaParts
from burnish.policies.pretrained import load_tokenizer, require_inside
from burnish.policies.vlm import add_actions

_TOKENIZER = "action_tokenizer_processor"
PREFIX, STOP = "Action: ", "|"


@POLICIES.register("pi0_fast")
class Pi0Fast(PaliGemmaParts):
    """burnish's verbs over lerobot's PI0FastPolicy.

    FAST's tokens stand for frequencies of the whole chunk: none belongs to a control step, so padded steps count in
    `loss` and `score`, and committed actions cannot be continued.
    """

    capabilities = PaliGemmaParts.capabilities | {"likelihood"}
    processor_steps = ("pi0_fast_prepare_state_tokenizer_processor_step", _TOKENIZER)

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any, sizes: dict | None = None):
        super().__init__(policy, preprocessor, postprocessor, sizes)
        self.fast, self.words = policy.action_tokenizer.fast, policy._paligemma_tokenizer
        self._prefix = self.words.encode(PREFIX, add_special_tokens=False)
        self._stops = {self.words.convert_tokens_to_ids(STOP), self.words.eos_token_id}
        for step in preprocessor.steps:
            if type(step).__name__ == "ActionTokenizerProcessorStep":  # what it was given by hand it would not store
                step.action_tokenizer_input_object, step.action_tokenizer_name = None, self.config.action_tokenizer_name
                step.trust_remote_code = True  # LeRobot itself reads FAST by its authors' code

    @classmethod
    def read_config(cls, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Both tokenizers are read from inside the folder."""
        names = {"action_tokenizer_name": "lerobot/fast-action-tokenizer",
                 "text_tokenizer_name": "google/paligemma-3b-pt-224", **raw}  # fmt: skip
        fast = require_inside(folder, FAST_FOLDER, names["action_tokenizer_name"])
        text = require_inside(folder, cls.tokenizer_folder, names["text_tokenizer_name"])
        return {**raw, "action_tokenizer_name": str(fast), "text_tokenizer_name": str(text)}

    @classmethod
    def own_steps(cls, config: Any) -> dict[str, dict[str, Any]]:
        options = {"action_tokenizer_input_object": FastCall(config), "action_tokenizer_name": None,
                   "trust_remote_code": False, "fast_skip_tokens": config.fast_skip_tokens,
                   "max_action_tokens": config.max_action_tokens,
                   "paligemma_tokenizer_name": config.text_tokenizer_name}  # fmt: skip
        return {**super().own_steps(config), _TOKENIZER: options}

    @classmethod
    def build(cls, config: Any, seed: int, folder: Path | None = None) -> nn.Module:
        with local_tokenizers(config):
            return super().build(config, seed, folder)

    # The verbs.

    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """Cross-entropy of the answer's tokens in nats: `total` over all of the batch, `per_sample` over one's own."""
        losses, real = self._losses(batch, batch[ACTION])
        summed, counted = losses.sum(1), real.sum(1)
        total = summed.sum() / counted.sum().clamp_min(1)
        return PolicyLoss(total, summed / counted.clamp_min(1), {"cross_entropy": total})

    def score(self, batch: Batch, actions: Tensor, draws: Draws) -> Tensor:
        """[B] log-probability of the answer that spells `actions`, in nats, exact by the chain rule."""
        losses, _ = self._losses(batch, actions, whole=True)
        return -losses.sum(1)

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """`score` of C chunks, [B, C, K]: the same for all K draws, which change nothing."""
        columns = [self.score(batch, candidates[:, c], draws) for c in range(candidates.shape[1])]
        return torch.stack(columns, dim=1)[..., None].expand(-1, -1, draws.time.shape[-1])

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None) -> Chunk:
        """Decode a chunk [B, T, A] on the CPU, in environment units: token by token until "|" or <eos>.

        Greedy unless the config's temperature is above 0; then `draws` decide. An answer that spells no chunk becomes
        the middle of the normalised range, as with LeRobot.
        """
        if prefix is not None and prefix.shape[1]:
            raise lacks(self, "prefix", "act")
        prepared = self._prepare(batch, None)
        images, present = self.prepare_images(prepared)
        first = torch.zeros(len(images[0]), 1, dtype=torch.bool, device=self.device)  # <bos>
        self._note_answer(images, present, prepared[TOKEN_MASK], first)
        with drawn((draws or self.draw(len(batch[TASK]), self.generator)).noise):
            tokens = self.policy.model.sample_actions_fast_kv_cache(
                images, present, prepared[TOKENS], prepared[TOKEN_MASK],
                max_decoding_steps=self.config.max_decoding_steps, temperature=self.config.temperature,
            )  # fmt: skip
        return Chunk(self.postprocessor(self.read(tokens.tolist()).to(self.device)))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Seeds of the tokens that are drawn where the temperature is above 0."""
        return seeds(batch_size, generator)

    def read(self, rows: list[list[int]]) -> Tensor:
        """Normalised actions [B, T, A] of B answers in PaliGemma's ids."""
        return self.fast.read([self._fast_ids(row) for row in rows])

    def model_stages(self) -> list[Stage]:
        return [Stage("vision", self.inner, "embed_image"), Stage("prompt", self.inner, "forward"),
                Stage("head", self.vlm.lm_head, "forward")]  # fmt: skip

    def write_extras(self, folder: Path, home: Path) -> None:
        """Both tokenizers' files."""
        super().write_extras(folder, home)
        source, place = Path(self.config.action_tokenizer_name), folder / FAST_FOLDER
        if source.absolute() != place.absolute():
            place.mkdir(exist_ok=True)
            for file in filter(Path.is_file, source.iterdir()):
                shutil.copyfile(file, place / file.name)
        names = {"action_tokenizer_name": home / FAST_FOLDER, "text_tokenizer_name": home / self.tokenizer_folder}
        folders.point_at(folder, str(home / self.tokenizer_folder), **{k: str(v) for k, v in names.items()})

    # Inside.

    def _losses(self, batch: Batch, actions: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Losses [B, L - 1] of each token of the answer given those before it, zero where bool [B, L - 1] is False."""
        from lerobot.policies.common.vla_utils import prepare_attention_masks_4d

        self._check_chunk(actions)
        prepared, model = self._prepare(batch, actions), self.policy.model
        tokens, real = prepared[ACTION_TOKENS], prepared[ACTION_TOKEN_MASK].bool()
        if whole and not bool((tokens == self.words.convert_tokens_to_ids(STOP)).any(1).all()):
            raise BurnishError(f"a chunk that takes more than {self.config.max_action_tokens} FAST tokens",
                               "at most max_action_tokens", "--policy.overrides.max_action_tokens=512")  # fmt: skip
        images, present = self.prepare_images(prepared)
        self._note_answer(images, present, prepared[TOKEN_MASK], real)
        embeds, pad, allowed, _, count = model.embed_prefix_fast(
            images, present, prepared[TOKENS], prepared[TOKEN_MASK], fast_action_tokens=tokens, fast_action_masks=real
        )
        if self.backbone.text_model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            embeds = embeds.bfloat16()
        (states, _), _ = self.inner.forward(
            attention_mask=prepare_attention_masks_4d(allowed, dtype=embeds.dtype),
            position_ids=torch.cumsum(pad, dim=1) - 1, past_key_values=None, inputs_embeds=[embeds, None],
            use_cache=False, adarms_cond=[None, None],
        )  # fmt: skip
        learned = real[:, 1:]
        logits = self.vlm.lm_head(states[:, -count:-1][learned])
        losses = F.cross_entropy(logits.float(), tokens[:, 1:][learned], reduction="none")
        return torch.zeros(learned.shape, device=losses.device).masked_scatter(learned, losses), learned

    def _note_answer(self, images: list[Tensor], present: list[Tensor], text: Tensor, answer: Tensor) -> None:
        self._note(images, present, text)
        for captured in self._captures:
            add_actions(captured, answer)

    def _fast_ids(self, answer: list[int]) -> list[int]:
        """FAST's ids in an answer; empty where it holds a token that can be none."""
        end = next((place for place, token in enumerate(answer) if token in self._stops), len(answer))
        answer, width, start = answer[:end], len(self._prefix), 0
        while width and start <= len(answer) - width:
            if answer[start : start + width] == self._prefix:
                del answer[start : start + width]
            else:
                start += 1
        ids = [self.words.vocab_size - 1 - self.config.fast_skip_tokens - token for token in answer]
        return ids if all(token >= 0 for token in ids) else []


class FastCall:
    """FAST's tokenizer as LeRobot calls it, from the files in `config.action_tokenizer_name`; no code there is run."""

    def __init__(self, config: Any):
        self.fast = Fast(config.action_tokenizer_name, config.action_feature.shape[0], config.chunk_size,
                         config.max_action_tokens)  # fmt: skip

    def __call__(self, actions: Tensor) -> list[list[int]]:
        return self.fast.spell(actions)


@contextmanager
def local_tokenizers(config: Any) -> Iterator[None]:
    """Inside, LeRobot gets the tokenizers in the folders that `config` names, whatever it asks for."""
    from lerobot.policies.pi0_fast import modeling_pi0_fast
    from lerobot.processor import tokenizer_processor

    text, call = Path(config.text_tokenizer_name), FastCall(config)
    fast = SimpleNamespace(from_pretrained=lambda *_, **__: call)
    words = SimpleNamespace(from_pretrained=lambda *_, **options: load_tokenizer(text, **options))
    with (
        patch.multiple(modeling_pi0_fast, AutoProcessor=fast, AutoTokenizer=words),
        patch.multiple(tokenizer_processor, AutoProcessor=fast, AutoTokenizer=words),
    ):
        yield
