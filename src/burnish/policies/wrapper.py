"""What all adapters of LeRobot policies share: processors, language verbs, capture, saving.

The LeRobot policy sits in `PolicyWrapper.policy`, unchanged, so parameter names start with "policy." and are otherwise
those of `model.safetensors`. Its processors sit beside it and are used inside the verbs, once.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core import seeding
from burnish.core.errors import BurnishError
from burnish.core.types import Batch, LanguageLoss
from burnish.policies import hidden, language
from burnish.policies.base import Captured, Policy, Stage

IMAGES, STATE, ACTION, PAD, TASK = "observation.images.", "observation.state", "action", "action_is_pad", "task"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


class PolicyWrapper(Policy):
    """A LeRobot policy with its processors.

    Args:
        policy: LeRobot's PreTrainedPolicy.
        preprocessor, postprocessor: LeRobot's pipelines for it.

    Attributes:
        generator: draws for `loss` and `act` when the caller gives none.
        n_action_steps: steps of a chunk to execute before asking again.
    """

    capabilities = frozenset({"language", "capture", "score"})
    state_rows = 0
    """Rows of state at the end of the backbone's sequence."""

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__()
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.config = policy.config
        self.name = policy.config.type
        self.camera_keys = tuple(k for k in self.config.image_features if not k.startswith(f"{IMAGES}empty_camera_"))
        self.cameras = tuple(key.removeprefix(IMAGES) for key in self.camera_keys)
        self.chunk_size = self.config.chunk_size
        self.n_action_steps = self.config.n_action_steps
        self.image_size = self.config.image_features[self.camera_keys[0]].shape[-1]
        self.action_dim = self.config.action_feature.shape[0]
        self.state_dim = self.config.robot_state_feature.shape[0]
        self.num_layers = len(self.backbone.text_model.layers)
        self.generator = seeding.generator("policy draws")
        self._captures: list[Captured] = []
        self.requires_grad_(True)

    # What a family of policies has to say.

    @property
    @abstractmethod
    def vlm(self) -> nn.Module:
        """The vision-language model inside: vision tower, connector, language model, head."""

    @property
    @abstractmethod
    def backbone(self) -> language.Backbone:
        """The parts of `vlm` that the language verbs need."""

    @abstractmethod
    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], as the model takes it, to [B, n, D] as the language model takes it."""

    @abstractmethod
    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """LeRobot's resized images, list of [B, 3, H, W] in [-1, 1], and list of bool [B]."""

    @abstractmethod
    def image_tokens(self, image: Tensor) -> int:
        """Number of backbone rows of `image` [B, 3, H, W]."""

    @abstractmethod
    def unused_parameters(self) -> list[str]:
        """Names of parameters that `loss` leaves without gradient (None or exactly zero)."""

    @abstractmethod
    def model_stages(self) -> list[Stage]:
        """The model's calls of names vision, prompt, pass and head."""

    def stages(self) -> list[Stage]:
        """What `act` consists of, for the profiler."""
        return [
            Stage("preprocess", self, "_prepare"),
            Stage("preprocess", self, "prepare_images"),
            *self.model_stages(),
            Stage("postprocess", self, "postprocessor"),
        ]

    # The verbs that all families answer alike.

    def language(self, batch: Batch) -> LanguageLoss:
        """Losses of `batch["answer"]`: B strings, or B lists of them (several questions about one image)."""
        image = self._question_image(batch)
        return language.answer_loss(self.backbone, image, batch["question"], batch["answer"])

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to `batch["question"]`, each independent of the rest of the batch."""
        image = self._question_image(batch)
        return language.greedy_answers(self.backbone, image, batch["question"], max_new_tokens)

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

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Vision tower, connector, language model and its head; not the action expert, not the projections."""
        inside = {id(parameter) for parameter in self.vlm.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in inside)

    def normalization(self, kind: str) -> str:
        mode = self.config.normalization_mapping.get(kind)
        return "" if mode is None else mode.value

    def settings(self) -> dict[str, Any]:
        return dict(vars(self.config))

    def save(
        self,
        folder: Path,
        *,
        home: Path | None = None,
        dtype: torch.dtype | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write an ordinary LeRobot policy folder; see folder.write for the arguments."""
        from burnish.policies.folder import write

        write(self, Path(folder), home=home, dtype=dtype, state_dict=state_dict)

    @abstractmethod
    def write_extras(self, folder: Path, home: Path) -> None:
        """Write the files beside config, weights and processors that make the folder self-contained."""

    # Inside.

    def _prepare(self, batch: Batch, actions: Tensor | None) -> dict[str, Any]:
        """Check the batch and run LeRobot's preprocessor over the keys that the policy reads."""
        missing = [key for key in (*self.camera_keys, STATE, TASK) if key not in batch]
        if missing:
            raise BurnishError(
                f"a batch without {', '.join(missing)} (it has {', '.join(batch)})",
                f"cameras {', '.join(self.cameras)}, {STATE} and {TASK}",
                "load the policy with features= of your data set",
            )
        chosen = {key: batch[key] for key in (*self.camera_keys, STATE, TASK)}
        if actions is not None:
            chosen[ACTION] = actions
            _check_width(ACTION, actions, self.action_dim)
            if actions.shape[-2] > self.chunk_size:
                raise BurnishError(f"{actions.shape[-2]} actions", f"at most the chunk of {self.chunk_size}")
        _check_width(STATE, chosen[STATE], self.state_dim)
        prepared = self.preprocessor(chosen)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in prepared.items()}

    def _note(self, images: list[Tensor], masks: list[Tensor], text_mask: Tensor) -> None:
        """Give every open capture the token layout of the forward that follows."""
        if not self._captures:
            return
        names = [*self.cameras, *[""] * (len(images) - len(self.cameras))]
        parts = [(n, self.image_tokens(i), m) for n, i, m in zip(names, images, masks, strict=True)]
        for captured in self._captures:
            self._note_rows(captured, parts, text_mask)

    def _note_rows(self, captured: Captured, parts: list[tuple[str, int, Tensor]], text_mask: Tensor) -> None:
        hidden.note_rows(captured, parts, text_mask, state_rows=self.state_rows)

    def _question_image(self, batch: Batch) -> Tensor:
        """[B, n, D] embeddings of the one image of a question batch, resized as the policy's images are."""
        keys = [key for key in batch if key.startswith(IMAGES)]
        if len(keys) != 1:
            raise BurnishError(f"a question batch with {len(keys)} images", f"one {IMAGES}<camera>")
        # Any camera will do; LeRobot's preparation only knows those of the policy.
        images, _ = self.prepare_images({self.camera_keys[0]: batch[keys[0]].to(self.device)})
        image = self.embed_image(images[0])
        if self._captures:
            encoded = language.encode(self.backbone, image, batch["question"], batch.get("answer"))
            present = torch.ones(len(image), dtype=torch.bool, device=self.device)
            part = (keys[0].removeprefix(IMAGES), image.shape[1], present)
            for captured in self._captures:
                hidden.note_rows(captured, [part], encoded.attention_mask.bool())
        return image


def _check_width(key: str, value: Tensor, width: int) -> None:
    if value.shape[-1] != width:
        raise BurnishError(f"{key} of {value.shape[-1]} dimensions", f"{width}, as the policy's config declares")
