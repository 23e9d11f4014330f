"""The LeRobot policy: a linear map from the state and the mean colour of each camera to a chunk."""

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn

from sample_package.configuration_sample_linear import SampleLinearConfig


class SampleLinearPolicy(PreTrainedPolicy):
    config_class = SampleLinearConfig
    name = "sample_linear"

    def __init__(self, config, **_):
        super().__init__(config)
        self.size = (config.chunk_size, config.action_feature.shape[0])
        inputs = config.robot_state_feature.shape[0] + 3 * len(config.image_features)
        self.head = nn.Linear(inputs, self.size[0] * self.size[1])

    def chunk(self, batch):
        colours = [batch[key].mean((-2, -1)) for key in self.config.image_features]
        return self.head(torch.cat([batch["observation.state"], *colours], -1)).unflatten(-1, self.size)

    def forward(self, batch):
        loss = (self.chunk(batch) - batch["action"]).square().mean()
        return loss, {}

    def get_optim_params(self):
        return self.parameters()

    def reset(self):
        pass

    def predict_action_chunk(self, batch, **_):
        return self.chunk(batch)

    def select_action(self, batch, **_):
        return self.chunk(batch)[:, 0]
