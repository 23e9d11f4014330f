"""The row norms that DoRA divides by, in closed form.

DoRA (Liu et al. 2024, arXiv:2402.09353) divides by |W + s B A| row by row. peft forms the whole product B A for that,
and by a forward over an identity matrix. But

    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        (row by row)

needs only W A^T [out, r] and A A^T [r, r]. As in the paper, the norm carries no gradient.
"""

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.functional import linear


@torch.no_grad()
def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, own: Tensor | None = None) -> Tensor:
    """[out] norms of the rows of weight + scaling * lora_b @ lora_a.

    Args:
        weight: [out, in].
        lora_a: [r, in].
        lora_b: [out, r].
        scaling: alpha / r.
        own: [out] squared row norms of `weight`, where they are known.
    """
    own = weight.square().sum(1) if own is None else own
    cross = ((weight @ lora_a.T) * lora_b).sum(1)
    product = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(1)
    return (own + 2 * scaling * cross + scaling**2 * product).clamp_min(0).sqrt()


def use_closed_form(policy: nn.Module) -> int:
    """Let every DoRA layer of linear modules inside `policy` take the closed form; returns how many there are.

    Parameters, checkpoints and merging stay peft's.
    """
    from peft.tuners.lora import Linear

    changed = 0
    for module in policy.modules():
        if not isinstance(module, Linear):
            continue
        for name, layer in module.lora_magnitude_vector.items():
            if type(layer) is DoraLinearLayer and not layer.fan_in_fan_out:
                fast = ClosedFormDora(fan_in_fan_out=False)
                fast.weight = layer.weight
                module.lora_magnitude_vector[name] = fast
                changed += 1
    return changed


class ClosedFormDora(DoraLinearLayer):
    """See burnish.train.dora for the norm."""

    _own: tuple[tuple, Tensor] | None = None

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        """What DoRA adds to the output of `base_layer`; see peft for the arguments."""
        weight, bias = base_layer.weight, base_layer.bias
        norm = row_norms(weight, lora_A.weight, lora_B.weight, scaling, self._squared_rows(weight))
        scale = self.weight / norm
        # Scaling the few rows of B is cheaper than scaling the many outputs; the layer's bias stays out of DoRA.
        shift = None if base_result is None or bias is None else (1 - scale) * bias
        low_rank = linear(lora_A(x), (scale * scaling)[:, None] * lora_B.weight, shift)
        base = linear(x, weight) if base_result is None else base_result
        return torch.addcmul(low_rank, scale - 1, base)

    def _squared_rows(self, weight: Tensor) -> Tensor:
        """Squared row norms of the frozen weight, kept until it changes."""
        key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        if self._own is None or self._own[0] != key:
            with torch.no_grad():
                self._own = key, weight.square().sum(1)
        return self._own[1]
