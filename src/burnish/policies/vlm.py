"""A LeRobot policy on a vision-language model: language verbs and capture, alike for all of them."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Draws, LanguageLoss
from burnish.policies import language
from burnish.policies.base import Captured, Stage, TokenForward, listed
from burnish.policies.keys import IMAGES, PAD
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
        """Hidden states of the backbone's `layers` (see catch); contexts may be nested."""
        captured = Captured()
        with catch(self.backbone.text_model, layers, captured):
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
        note_layout(captured, parts, text_mask, state_positions=self.state_positions)

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
                note_layout(captured, [part], encoded.attention_mask.bool(), around_image=(before, after))
        return image


class TokenPolicy(VLMPolicy):
    """One that writes its actions as tokens."""

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__(policy, preprocessor, postprocessor)
        self._watched: list[list[TokenForward]] = []

    def score(self, batch: Batch, actions: Tensor, draws: Draws) -> Tensor:
        """[B] `scores` of one chunk each."""
        one = {PAD: batch[PAD][:, None]} if PAD in batch else {}
        draws = Draws(draws.noise[:, None], draws.time[:, None])
        return self.scores({**batch, **one}, actions[:, None], draws)[:, 0, 0]

    @contextmanager
    def watch_tokens(self) -> Iterator[list[TokenForward]]:
        watched: list[TokenForward] = []
        self._watched.append(watched)
        try:
            yield watched
        finally:
            self._watched = [other for other in self._watched if other is not watched]

    def _behind(self, prefix: Tensor | None, actions: Tensor) -> Tensor:
        """Normalised actions [B, T, A] in environment units; `prefix` stands as it is, its tokens are coarser."""
        actions = self.postprocessor(actions)
        if prefix is not None:
            actions[:, : prefix.shape[1]] = prefix.to(actions)
        return actions


@contextmanager
def catch(text_model: nn.Module, layers: Sequence[int], captured: Captured) -> Iterator[None]:
    """Fill `captured.hidden` with the outputs of `layers` in a forward inside.

    `note_layout` starts a new forward; of that, the first run through a layer counts (decoding a token or recomputing
    a checkpointed layer comes later).

    LeRobot's joint forward calls the parts of a layer one by one, so hooks on whole layers stay silent. But every
    forward (joint, prefix only, plain language model) hands the output of layer i to the input norm of layer i + 1,
    and the last one to the final norm. The tensor caught there is the very one that flows on, gradient and all.

    Args:
        text_model: has `layers`, each with `input_layernorm`, and a final `norm`.
    """
    count = len(text_model.layers)
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise BurnishError(f"layers {wrong} to capture", f"numbers from 0 to {count - 1}")

    def keep(layer: int):
        def hook(_module: nn.Module, args: tuple) -> None:
            captured.hidden.setdefault(layer, args[0])

        return hook

    with ExitStack() as stack:
        for layer in layers:
            reader = text_model.norm if layer == count - 1 else text_model.layers[layer + 1].input_layernorm
            stack.callback(reader.register_forward_pre_hook(keep(layer)).remove)
        yield


def note_layout(captured: Captured, images: Sequence[tuple[str, int, Tensor]], text_mask: Tensor, *,
                state_positions: int = 0, around_image: tuple[int, int] = (0, 0), width: int = 0) -> None:  # fmt: skip
    """Start a forward: write down which positions of its sequence hold what (images, then text, then the state).

    Args:
        captured: gets `layout` and `cameras`.
        images: camera (empty for a blank filler), number of tokens, and a bool [B] whether it is there.
        text_mask: bool [B, L], False on padding.
        state_positions: positions of the state after the text.
        around_image: special tokens before and after each image; they count as neither image nor text.
        width: the sequence is padded to this length where it is shorter.
    """
    batch, device = text_mask.shape[0], text_mask.device
    before, after = around_image
    image_positions = sum(before + tokens + after for _, tokens, _ in images)
    used = image_positions + text_mask.shape[1] + state_positions
    empty = torch.zeros(batch, max(used, width), dtype=torch.bool, device=device)
    layout = {name: empty.clone() for name in ("image", "text", "state")}
    captured.cameras.clear()
    start = 0
    for camera, tokens, present in images:
        place = slice(start + before, start + before + tokens)
        layout["image"][:, place] = present[:, None]
        if camera:
            captured.cameras[camera] = place
        start = place.stop + after
    layout["text"][:, start : start + text_mask.shape[1]] = text_mask.bool()
    layout["state"][:, used - state_positions : used] = True
    captured.hidden.clear()
    captured.layout.clear()
    captured.layout.update(layout)


def add_actions(captured: Captured, tokens: Tensor) -> None:
    """Action tokens follow what `note_layout` wrote down; bool [B, L], False on those that are padding."""
    held = dict(captured.layout)
    captured.layout.update({name: torch.cat([mask, torch.zeros_like(tokens)], dim=1) for name, mask in held.items()})
    captured.layout["action"] = torch.cat([torch.zeros_like(held["text"]), tokens], dim=1)
