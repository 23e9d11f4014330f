"""Seeds travel as generators; nothing in burnish draws from a global one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: object) -> int:
    """A stable 63-bit seed from any printable parts, the same on every machine and Python version."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object, device: str = "cpu") -> "torch.Generator":
    """A torch.Generator seeded by `derive_seed(*parts)`."""
    import torch  # here, because simulator processes need seeds but not the second that torch takes to import

    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@contextmanager
def seeded(seed: int, device: "torch.device | str" = "cpu") -> Iterator[None]:
    """Inside, libraries that draw from torch's global generators begin at `seed`; afterwards these are as they were.

    torch.manual_seed would also seed the generator of every accelerator, for good: fork_rng puts back only what it is
    told of.

    Args:
        seed: of the CPU's generator, and of that of `device`.
        device: where weights are drawn.
    """
    import torch

    place = torch.device(device)
    gpus = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
