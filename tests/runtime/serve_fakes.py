"""A policy that acts on what it sees and on its noise, and a server around it in a thread."""

import threading
import time
from contextlib import contextmanager

import torch

from burnish.core.errors import BurnishError
from burnish.core.types import Chunk, Draws
from burnish.policies.base import Policy
from burnish.runtime.serve.run import serve_policy
from burnish.runtime.serve.server import ServeOptions


class Seen(Policy):
    """Actions [4, 7]: the mean of its views plus the sum of its state plus its noise; committed rows as they are."""

    name, capabilities = "seen", frozenset({"prefix"})
    chunk_size, n_action_steps, action_dim, state_dim, num_layers = 4, 2, 7, 8, 0

    def __init__(self, cameras=("image", "wrist_image"), state_dim=8, seconds=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.cameras, self.state_dim, self.seconds = cameras, state_dim, seconds
        self.image_size, self.calls, self.broken = 8, [], None

    def act(self, batch, draws=None, prefix=None):
        self.calls.append(batch)
        time.sleep(self.seconds)
        if self.broken in batch["task"]:
            raise RuntimeError("no such\ntask")
        parts = [batch[f"observation.images.{name}"].flatten(1).mean(1) for name in self.cameras]
        parts += [batch["observation.state"].flatten(1).sum(1)] if self.state_dim else []
        actions = draws.noise + sum(parts)[:, None, None] / self.weight
        if prefix is not None:
            actions = torch.cat([prefix, actions[:, prefix.shape[1] :]], 1)
        if "nan" in batch["task"]:
            actions[batch["task"].index("nan")] = float("nan")
        return Chunk(actions.detach())

    def draw(self, batch_size, generator):
        return Draws(torch.randn(batch_size, 4, 7, generator=generator), torch.ones(batch_size))

    def loss(self, batch, draws=None): ...
    def save(self, folder, *, home=None): ...


class Served:
    """Address, the server's object and how to end it."""

    def __init__(self, server, port, stop):
        self.server, self.port, self.stop = server, port, stop
        self.address = f"ws://127.0.0.1:{port}"


@contextmanager
def served(policy, watchdog=None, **options):
    """A server around `policy` in a thread of its own."""
    ready, known, failed = threading.Event(), [], []

    def run():
        try:
            serve_policy(policy, ServeOptions(**{"port": 0, **options}),
                         ready=lambda *found: (known.extend(found), ready.set()), watchdog=watchdog)  # fmt: skip
        except BurnishError as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    if failed:
        thread.join(5)
        raise failed[0]
    try:
        yield Served(*known)
    finally:
        known[2]()
        thread.join(20)
        assert not thread.is_alive()
        if failed:
            raise failed[0]


def watching(**views):
    """What makes a watchdog of a training set of one frame, of a picture for each view; see `serve_policy`."""
    import numpy as np

    from burnish.data.search import Index, build
    from burnish.data.vectors import FRAME, Vectors, make_encoder
    from burnish.data.watchdog import Watchdog

    encoder = make_encoder("pixels")
    about = {"encoder": encoder.identity, "spec": "pixels", "head": "", "data": "d", "cameras": list(views)}
    index = Index(build(Vectors(encoder(np.stack(list(views.values())))[None], np.zeros(1, FRAME), about)))
    return lambda policy, weights: Watchdog(index, encoder, policy.cameras)
