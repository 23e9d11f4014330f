"""A method: pulls all trained weights towards zero."""

from burnish.methods.objective import Objective


class Decay(Objective):
    """Adds weight / 2 times the squared norm of the trained weights."""

    def __init__(self, weight: float = 1e-3):
        super().__init__()
        self.weight = weight

    def loss(self, run, batch, out):
        squared = sum(p.square().sum() for p in run.policy.parameters() if p.requires_grad)
        return {"sample_decay": self.weight / 2 * squared}
