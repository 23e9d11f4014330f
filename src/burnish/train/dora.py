"""The row norms that DoRA divides by, in closed form.

DoRA (Liu et al. 2024, arXiv:2402.09353) divides by |W + s B A| row by row. peft forms the whole product B A for that,
and by a forward over an identity matrix. But

    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        (row by row)

needs only W A^T [out, r] and A A^T [r, r]. As in the paper, the norm carries no gradient.
"""

import torch
from torch import Tensor


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
