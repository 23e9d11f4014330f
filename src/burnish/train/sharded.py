"""Weights in parts: FSDP2 (torch's `fully_shard`) over the ranks that a launcher started.

Every rank holds some rows of each parameter, of its gradient and of what AdamW and the average keep about it. A block
of the policy is whole only while it runs; what lies outside of blocks is whole from the beginning of a step's forward
to the end of its backward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.methods.gradients import local, sharded


def check_launch(accelerator: Any, wanted: bool) -> None:
    """Raise BurnishError where accelerate's own settings contradict `train.shard`."""
    plugin = _plugin(accelerator)
    if plugin is not None and plugin.fsdp_version != 2:
        raise BurnishError("accelerate is set to FSDP version 1", "version 2", "accelerate launch --fsdp_version 2")
    if plugin is not None and not wanted:
        raise BurnishError("accelerate is set to FSDP, and train.shard is false", "one way of training",
                           "--train.shard=true, or accelerate launch without --use_fsdp")  # fmt: skip


def _plugin(accelerator: Any) -> Any:
    """accelerate's settings of FSDP, None where its launcher was given none."""
    return accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None


class Shards:
    """The root of a sharded step, and what methods and the loop may do with it from inside and outside its forward.

    Args:
        root: the module of a step; its parameters are replaced by DTensors here.
        blocks: parts of it that are gathered one by one, each called as a module, see Policy.blocks.
        accelerator: accelerate's. A device mesh that its launcher described (hybrid sharding, say) is taken over.

    Raises:
        BurnishError: a trained parameter is a single number, which FSDP2 cannot shard.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], accelerator: Any):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        scalars = {p for p in root.parameters() if p.ndim == 0}
        single = [name for name, p in root.named_parameters() if p in scalars and p.requires_grad]
        if single:
            raise BurnishError(f"train.shard: the trained parameter '{single[0]}' is a single number", "one with rows",
                               f"--train.freeze='[{single[0].removeprefix('policy.')}]'")  # fmt: skip
        described = accelerator.parallelism_config
        if described is None:
            mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("shard",))
        else:
            mesh = accelerator.torch_device_mesh[tuple(described.fsdp_dim_names)]
        plugin = _plugin(accelerator)
        put_away = True if plugin is None else plugin.reshard_after_forward
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=put_away, ignored_params=scalars)
        fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        self.root: Any = root
        self._group = mesh.get_group(mesh.ndim - 1)

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the ranks that share the rows of one copy of the weights."""
        whole = partial.clone()
        torch.distributed.all_reduce(whole, group=self._group)
        return whole

    def ask[T](self, call: Callable[..., T], *args: Any) -> T:
        found = self.root(call, *args)
        self.root.reshard()  # it would stay whole, and old, until the next backward
        return found

    @contextmanager
    def inner_backward(self) -> Iterator[None]:
        """See methods.objective.Run: what lies outside of blocks stays whole for the rest of the forward."""
        self.root.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            self.root.set_reshard_after_backward(True, recurse=False)

    def gradients(self, loss: Tensor, trained: Mapping[str, nn.Parameter], retain_graph: bool) -> dict[str, Tensor]:
        """Gradients of `loss`, this rank's rows of the mean over ranks, by name; every `.grad` stays as it was."""
        kept = {name: p.grad for name, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = None
        try:
            with self.inner_backward():
                # Handed out by the root, so that a loss which no block reaches is seen by its hooks too.
                self.root(partial(_same, loss)).backward(retain_graph=retain_graph)
            return {name: local(p.grad) for name, p in trained.items() if p.grad is not None}
        finally:
            for name, parameter in trained.items():
                parameter.grad = kept[name]

    @contextmanager
    def holding(self, values: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """See methods.objective.Run; `values` are exchanged with the parameters' own and back, so nothing is copied."""
        pairs = [(local(trained[name]), value) for name, value in values.items()]
        self.root.set_reshard_after_forward(True, recurse=False)
        self._exchange(pairs)
        try:
            yield
        finally:
            self._exchange(pairs)
            self.root.set_reshard_after_forward(False, recurse=False)

    def _exchange(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.root.reshard()
        exchange(pairs)
        torch.clear_autocast_cache()  # it knows a weight by its place, and would give out the other's cast
        self.root.unshard()


@torch.no_grad()
def exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let two tensors of a shape swap their numbers, pair by pair; where they lie stays as it is."""
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def rows_like(parameter: Tensor, mine: Tensor) -> Tensor:
    """This rank's rows as a tensor that is sharded as `parameter` is; themselves where that is whole."""
    if not sharded(parameter):
        return mine
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(mine, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())  # fmt: skip


def _same[T](value: T) -> T:
    return value


def switch_parameters(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Let an optimiser that has made no step train the parameters of `after` in place of those of `before`."""
    new = {parameter: after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
