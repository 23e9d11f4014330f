"""Seeds travel as generators; nothing in burnish draws from a global one."""

import hashlib
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
