"""Part 1: tiny policies give the same numbers on the GPU as on the CPU, on draws that were made on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.gpu_meter import Setting, relative

KINDS = ("smolvla", "pi0", "pi05", "burnish_discrete")
OVERRIDES: dict[str, dict[str, Any]] = {"burnish_discrete": {"block_size": 7}}
TARGETS = {f"{what}_float32": "<= 1e-4" for what in ("loss", "gradient", "act", "edit", "preference")}
TARGETS["loss_bf16"] = "<= 1e-2"


def run(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each policy: the relative difference of loss, gradient, actions, an edited gradient and that of a preference
    loss in float32, and of the loss under bf16 autocast.
    """
    import torch

    from burnish.policies import load_policy
    from workshop.tiny import make_tiny

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # convolutions are in TF32 otherwise, which is no float32
    try:
        with TemporaryDirectory() as temporary:
            for kind in KINDS:
                folder = make_tiny(kind, Path(temporary) / kind, overrides=OVERRIDES.get(kind))
                policies = [load_policy(folder, device=device) for device in ("cpu", setting.device)]
                yield kind, compare(*policies)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def compare(one: Any, other: Any) -> dict[str, float]:
    """Relative differences of `other`, on whatever device, from `one` on the CPU; both hold the same weights."""
    import torch

    from burnish.runtime.observations import observations

    batch = observations(one, 2)
    draws, random = one.draw(2, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    shape = one.chunk_size, one.action_dim
    batch["action"] = torch.randn(2, *shape, generator=random)
    pairs = torch.randn(2, 2, *shape, generator=random)
    found = {}
    losses, gradients = zip(*(_loss(policy, batch, draws) for policy in (one, other)), strict=True)
    found["loss_float32"], found["gradient_float32"] = relative(losses[1], losses[0]), relative(*_flat(*gradients))
    found["edit_float32"] = relative(*_flat(*map(_edited, gradients)))
    preferred = [_preference(policy, batch, pairs, draws) for policy in (one, other)]
    found["preference_float32"] = relative(*_flat(*preferred))
    chunks = [policy.eval().act(moved(batch, policy), draws).actions for policy in (one, other)]
    found["act_float32"] = relative(chunks[1], chunks[0])
    with torch.autocast(other.device.type, torch.bfloat16), torch.no_grad():
        found["loss_bf16"] = relative(other.loss(moved(batch, other), draws).total, losses[0])
    return found


def moved(batch: dict[str, Any], policy: Any) -> dict[str, Any]:
    from burnish.data.loader import to_device

    return to_device(dict(batch), policy.device)


def _loss(policy: Any, batch: dict[str, Any], draws: Any) -> tuple[Any, dict[str, Any]]:
    policy.zero_grad(set_to_none=True)
    loss = policy.loss(moved(batch, policy), draws).total
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def _flat(one: dict[str, Any], other: dict[str, Any]) -> tuple[Any, Any]:
    """`other` and `one` as vectors of the same order: found, truth."""
    import torch

    return tuple(torch.cat([tensors[name].flatten().cpu() for name in one]) for tensors in (other, one))


def _edited(gradients: dict[str, Any]) -> dict[str, Any]:
    """The gradients less their part along a direction that every layer conflicts with."""
    import torch

    from burnish.methods.gradients import Layout
    from burnish.methods.isolate.project import Direction, edit

    random = torch.Generator().manual_seed(2)
    task = {name: g.clone() for name, g in gradients.items()}
    protected = {n: (torch.randn(g.shape, generator=random) * g.cpu().std() - 0.3 * g.cpu()).to(g.device)
                 for n, g in task.items() if g.numel() > 1}  # fmt: skip
    task = {name: task[name] for name in protected}
    layout = Layout({n: g.shape for n, g in task.items()}, "layer", next(iter(task.values())).device)
    edit(layout.parts(task), Direction(layout.parts(protected), layout), layout)
    return task


def _preference(policy: Any, batch: dict[str, Any], pairs: Any, draws: Any) -> dict[str, Any]:
    """Gradient of a DPO loss with nothing for reference."""
    import torch

    from burnish.core.types import Draws
    from burnish.methods.prefer.losses import dpo, margin

    policy.zero_grad(set_to_none=True)
    seen = {key: value for key, value in batch.items() if key != "action"}
    drawn = Draws(draws.noise[:, None], draws.time[:, None]).to(policy.device)
    scores = policy.scores(moved(seen, policy), pairs.to(policy.device), drawn).mean(-1)
    dpo(margin(scores, torch.zeros_like(scores)), 0.1).mean().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The worst policy of each."""
    names = dict.fromkeys(name for row in found.values() for name in row)
    return {name: max(row[name] for row in found.values() if name in row) for name in names}
