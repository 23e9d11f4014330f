"""A LeRobot policy on a vision-language model: language verbs and capture, alike for all of them."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, LanguageLoss
from burnish.policies import hidden, language
from burnish.policies.base import Captured, Stage, listed
from burnish.policies.keys import IMAGES
from burnish.policies.language import Backbone
from burnish.policies.wrapper import PolicyWrapper

SPARE_IDS = 1024
"""Token ids beyond the embeddings that a tokenizer may know: PaliGemma's image token is one, and no text makes it."""


class VLMPolicy(PolicyWrapper):
    """A LeRobot policy whose backbone is a vision-language model, with its processors."""

    capabilities = frozenset({"language", "capture", "score"})
    state_positions = 0
    """Token positions of the state at the end of the backbone's sequence."""

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__(policy, preprocessor, postprocessor)
        self.num_layers = len(self.backbone.text_model.layers)
        rows = self.backbone.text_model.get_input_embeddings().weight.shape[0]
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        if highest >= rows + SPARE_IDS:
            raise BurnishError(f"the tokenizer has the id {highest}, and the model {rows} embeddings",
                               "the tokenizer of that model")  # fmt: skip
        self._captures: list[Captured] = []

    # What a family of policies has to say.

    @property
    @abstractmethod
    def vlm(self) -> nn.Module:
        """The vision-language model inside: vision tower, connector, language model, head."""

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The parts of `vlm` that the language verbs need, as the VLM was trained to read."""

    @property
    def prefix(self) -> Backbone:
        """`backbone` as the policy reads: embeddings, masks and positions are those of its own prefix in `loss`."""
        return replace(self.backbone, see_prompt=True)

    @abstractmethod
    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], as the model takes it, to [B, n, D] as the language model takes it."""

    @abstractmethod
    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """LeRobot's resized images, list of [B, 3, H, W] in [-1, 1], and list of bool [B]."""

    @abstractmethod
    def image_tokens(self, image: Tensor) -> int:
        """Number of token positions of `image` [B, 3, H, W] in the backbone."""

    @property
    def tokenizer(self) -> Any:
        from lerobot.processor import TokenizerProcessorStep

        for step in self.preprocessor.steps:
            if isinstance(step, TokenizerProcessorStep):
                return step.input_tokenizer
        raise BurnishError("the preprocessor has no tokenizer_processor, which a policy of this type reads its "
                           "instruction by", "LeRobot's steps")  # fmt: skip

    def blocks(self) -> list[nn.Module]:
        """Layers of the vision tower, the language model and whatever else has layers."""
        return [block for block in listed(self) if any(True for _ in block.parameters())]

    def stages(self) -> list[Stage]:
        first, *others = super().stages()
        return [first, Stage("preprocess", self, "prepare_images"), *others]

    # The verbs that all families answer alike.

    def language(self, batch: Batch, through: Literal["vlm", "prefix"] = "vlm") -> LanguageLoss:
        """Losses of `batch["answer"]`: B strings, or B lists of them (several questions about one image)."""
        backbone = self.prefix if through == "prefix" else self.backbone
        image = self._question_image(batch, backbone)
        return language.answer_loss(backbone, image, batch["question"], batch["answer"])

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to `batch["question"]`, each independent of the rest of the batch."""
        image = self._question_image(batch, self.backbone)
        return language.greedy_answers(self.backbone, image, batch["question"], max_new_tokens)

    def view_tokens(self, images: Tensor) -> Tensor:
        """See Policy.view_tokens; any camera will do, as in `language`."""
        return self.embed_image(self.prepare_images({self.camera_keys[0]: images.to(self.device)})[0][0])

    @contextmanager
    def capture(self, layers: Sequence[int]) -> Iterator[Captured]:
        """Hidden states of the backbone's `layers` (see hidden.catch); contexts may be nested."""
        captured = Captured()
        with hidden.catch(self.backbone.text_model, layers, captured):
            self._captures.append(captured)
            try:
                yield captured
            finally:
                self._captures.remove(captured)

    @torch.no_grad()
    def view_mask(self, size: tuple[int, int]) -> Tensor:
        """See Policy.view_mask: the pixels in which a white and a black view differ."""
        views = (torch.full((1, 3, *size), shade, device=self.device) for shade in (0.0, 1.0))
        black, white = (self.prepare_images({self.camera_keys[0]: view})[0][0] for view in views)
        return (black != white).any(1)[0].cpu()

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Vision tower, connector, language model and its head; not the action expert, not the projections."""
        inside = {id(parameter) for parameter in self.vlm.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in inside)

    # Inside.

    def _note(self, images: list[Tensor], masks: list[Tensor], text_mask: Tensor) -> None:
        """Give every open capture the token layout of the forward that follows."""
        if not self._captures:
            return
        names = [*self.cameras, *[""] * (len(images) - len(self.cameras))]
        parts = [(n, self.image_tokens(i), m) for n, i, m in zip(names, images, masks, strict=True)]
        for captured in self._captures:
            self._note_layout(captured, parts, text_mask)

    def _note_layout(self, captured: Captured, parts: list[tuple[str, int, Tensor]], text_mask: Tensor) -> None:
        hidden.note_layout(captured, parts, text_mask, state_positions=self.state_positions)

    def _question_image(self, batch: Batch, backbone: Backbone) -> Tensor:
        """[B, n, D] embeddings of the one image of a question batch, resized as the policy's images are."""
        keys = [key for key in batch if key.startswith(IMAGES)]
        if len(keys) != 1:
            raise BurnishError(f"a question batch with {len(keys)} images", f"one {IMAGES}<camera>")
        # Any camera will do; LeRobot's preparation only knows those of the policy.
        images, _ = self.prepare_images({self.camera_keys[0]: batch[keys[0]].to(self.device)})
        image = self.embed_image(images[0])
        if self._captures:
            encoded = language.encode(backbone, image, batch["question"], batch.get("answer"))
            present = torch.ones(len(image), dtype=torch.bool, device=self.device)
            part = (keys[0].removeprefix(IMAGES), image.shape[1], present)
            before, after = map(len, backbone.around_image)
            for captured in self._captures:
                hidden.note_layout(captured, [part], encoded.attention_mask.bool(), around_image=(before, after))
        return image
