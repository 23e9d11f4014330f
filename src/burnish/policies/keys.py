"""Keys of batches and names of files, as LeRobot has them."""

from typing import Any

IMAGES, STATE, ACTION, PAD, TASK = "observation.images.", "observation.state", "action", "action_is_pad", "task"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"
ACTION_TOKENS, ACTION_TOKEN_MASK = "action.tokens", "action.token_mask"

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
VLM_FOLDER = "vlm"
"""Inside a policy folder: config, tokenizer and processor of its VLM."""
FAST_FOLDER = "fast"
"""Inside a policy folder: the files of its FAST tokenizer."""
RULER = "go " * 400
"""A sentence that every tokenizer cuts at its limit: its row makes all texts of a batch as long as they can get."""
MODES = {
    "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"),
}  # fmt: skip
"""LeRobot's normalisations, and the two statistics that each goes by."""


def camera_keys(config: Any) -> tuple[str, ...]:
    """Keys of a policy's cameras, without the empty ones that fill up their number."""
    return tuple(key for key in config.image_features if not key.startswith(f"{IMAGES}empty_camera_"))
