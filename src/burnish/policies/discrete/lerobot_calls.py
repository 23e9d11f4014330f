"""What LeRobot's commands ask of a policy beyond training and acting: adapters, sharding, real-time chunks, text."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies import language
from burnish.policies.keys import VLM_FOLDER
from burnish.policies.pretrained import load_tokenizer


class LeRobotCalls:
    """The part of `DiscretePolicy` that only LeRobot calls."""

    config: Any
    model: nn.Module

    _action_queue_attrs = ("_queue",)
    """Where actions wait; LeRobot empties it when the instruction changes."""
    _fsdp_wrap_modules = ("LlamaDecoderLayer",)
    """Layers of SmolVLM's language model; for another VLM give --accelerator.fsdp.wrap_modules."""

    def supports_rtc(self) -> bool:
        """Committed actions are known tokens for every decoder; FAST's tokens have no order in time."""
        return self.model.tokens.time_ordered

    def committed(self, previous: Tensor | None, delay: int | None) -> Tensor | None:
        """The actions [B, n, A] that are executed while the next chunk is decoded, as a prefix of `decode`.

        Args:
            previous: [T, A] or [B, T, A], normalised actions of the earlier chunk that are left over.
            delay: how many of them will be executed by then.
        """
        if previous is None or not delay or previous.numel() == 0:
            return None
        if not self.supports_rtc():
            raise BurnishError("a committed prefix for a policy with FAST tokens, which have no order in time",
                               "a policy with binned tokens", "--inference.type=sync")  # fmt: skip
        previous = previous if previous.ndim == 3 else previous[None]
        return previous[:, : min(delay, self.config.chunk_size - 1), : self.config.action_dim]

    def supports_text_generation(self) -> bool:
        """The language model that writes actions still answers questions."""
        return True

    @torch.no_grad()
    def generate_text(self, batch: dict[str, Any]) -> str:
        """The greedy answer to `batch["query_text"]` about the first camera's image.

        Raises:
            BurnishError: a request for a subtask, which would steer the robot: no training makes an answer one.
        """
        if batch.get("query_kind", "vqa") != "vqa":
            raise BurnishError(f"a text query of kind '{batch['query_kind']}'", "vqa: a question about what is seen")
        images, _ = self.model.prepare_images(batch)
        vlm = self.model.vlm
        backbone = language.Backbone(text_model=self.model.text_model, head=vlm.get_output_embeddings(),
                                     embed_text=vlm.get_input_embeddings(), tokenizer=self._tokenizer())  # fmt: skip
        question = batch["query_text"]
        question = question if isinstance(question, str) else question[0]
        return language.greedy_answers(backbone, self.model.embed_image(images[0][:1]), [question], 16)[0]

    def _tokenizer(self) -> Any:
        return load_tokenizer(Path(self.config.vlm_model_name))

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """LoRA on queries and values of the language model, on the state's way in and the head over actions."""
        decoder = next(name for name, part in self.named_modules() if part is self.model.text_model)
        places = rf"{re.escape(decoder)}\..*\.(q|v)_proj|model\.(state_proj|head)"
        return {"target_modules": f"({places})", "modules_to_save": []}

    def _save_pretrained(self, save_directory: Path, **options: Any) -> None:
        """LeRobot's, and the VLM's small files beside it: what lerobot-train writes is whole, too."""
        super()._save_pretrained(save_directory, **options)
        source, place = Path(self.config.vlm_model_name), Path(save_directory) / VLM_FOLDER
        if source.is_dir() and source.absolute() != place.absolute():
            place.mkdir(exist_ok=True)
            for file in source.iterdir():
                if file.suffix in (".json", ".jinja", ".txt", ".model"):
                    shutil.copyfile(file, place / file.name)
