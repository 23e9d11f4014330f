"""LeRobot builds pi0, pi05 and pi0-FAST in one size each; inside `small_pi` it builds them in another."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

PI_SIZES = {
    "gemma_2b": {"width": 48, "depth": 3, "mlp_dim": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8},
    "gemma_300m": {"width": 32, "depth": 3, "mlp_dim": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8},
    "vision": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
"""Sizes of a tiny policy."""


@contextmanager
def small_pi(sizes: dict[str, Any], tokenizer: Path | None = None, image_size: int = 0) -> Iterator[None]:
    """Inside, LeRobot builds them in the sizes of a tiny policy (its `tiny.json`) instead of its only ones.

    Args:
        sizes: as PI_SIZES, with "vocab_size".
        tokenizer: folder that stands in for the tokenizer on the hub.
        image_size: side of the vision tower's images; 0 leaves LeRobot's.
    """
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0_fast import modeling_pi0_fast
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.processor import tokenizer_processor

    def pali_gemma(plain: Any) -> Any:
        def build(config: Any) -> Any:
            for name, value in sizes["vision"].items():
                setattr(config.vision_config, name, value)
            config.vision_config.image_size = image_size or config.vision_config.image_size
            config.vision_config.projection_dim = config.text_config.hidden_size
            config.text_config.vocab_size = sizes["vocab_size"]
            config.image_token_id = sizes["vocab_size"] - 1
            return plain(config=config)

        return build

    def gemma(plain: Any) -> Any:
        def build(config: Any) -> Any:
            config.vocab_size = sizes["vocab_size"]
            return plain(config=config)

        return build

    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05, modeling_pi0_fast):
            changes = {
                "get_gemma_config": lambda variant, m=module: m.GemmaConfig(**sizes[variant]),
                "PaliGemmaForConditionalGenerationWithPiGemma": pali_gemma(
                    module.PaliGemmaForConditionalGenerationWithPiGemma
                ),
            }
            if module is not modeling_pi0_fast:  # it has no action expert
                changes["PiGemmaForCausalLM"] = gemma(module.PiGemmaForCausalLM)
            stack.enter_context(patch.multiple(module, **changes))
        if tokenizer is not None:
            plain = tokenizer_processor.AutoTokenizer.from_pretrained
            local = type("LocalTokenizer", (), {"from_pretrained": staticmethod(lambda *_: plain(tokenizer))})
            stack.enter_context(patch.object(tokenizer_processor, "AutoTokenizer", local))
        yield
