"""LeRobot's processors of `sample_linear`."""

from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines


def make_sample_linear_pre_post_processors(config, dataset_stats=None):
    """Add the batch dimension, move, normalise; and back for actions."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
