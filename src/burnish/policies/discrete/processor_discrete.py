"""LeRobot's processors of `burnish_discrete`: the steps of SmolVLA's."""

from pathlib import Path
from typing import Any

from lerobot.processor import (
    NewLineTaskProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from burnish.policies.discrete.configuration_discrete import DiscreteConfig
from burnish.policies.pretrained import check_files


def make_burnish_discrete_pre_post_processors(
    config: DiscreteConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Rename, add the batch dimension, tokenise the instruction, move, normalise; and back for actions."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    if Path(config.vlm_model_name).is_dir():
        check_files(Path(config.vlm_model_name))
    tokenizer = TokenizerProcessorStep(tokenizer_name=config.vlm_model_name, padding=config.pad_language_to,
                                       padding_side="right", max_length=config.tokenizer_max_length)  # fmt: skip
    before = [steps.rename_observations, steps.add_batch_dim, NewLineTaskProcessorStep(), tokenizer, steps.to_device,
              steps.normalize]  # fmt: skip
    return make_policy_processor_pipelines(input_steps=before, output_steps=[steps.unnormalize, steps.to_cpu])
