"""Two gloo ranks on the CPU, started the way torchrun starts them: by environment variables."""

import gc
import multiprocessing
import os
import socket

import torch

HEAVY = ["fake", "burnish.train.loop", "lerobot.datasets", "accelerate", "safetensors.torch", "peft",
         "lerobot.policies.smolvla.modeling_smolvla", "torch.distributed.fsdp"]  # fmt: skip
"""Imported once, by the server that every rank is a fork of."""


def _rank(rank, world, port, body, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported stays
    body(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def two_ranks(body, *arguments, world=2):
    """Run `body(rank, *arguments)`, a function of a module, in fresh processes; what it patches ends with them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, world, port, body, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(900)
        assert process.exitcode == 0


def train_and_keep(recipe):
    """Train in this process; returns its `Run` and the trained weights as lists. Only for a process of its own."""
    from burnish.train import loop

    kept, original = [], loop.Run

    class Run(original):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    loop.Run = Run
    loop.train(recipe, progress=False)
    return kept[0], {n: p.detach().flatten().tolist() for n, p in kept[0].trained.items()}
