"""The fake policy with a vision tower."""

import fake
import torch


class Seeing(fake.FakePolicy):
    """Its tower hands out four tokens."""

    def view_tokens(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return self.backbone(torch.cat([cells, cells[:, :8] * 0], 1))[:, None].expand(-1, 4, -1)
