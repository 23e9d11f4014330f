"""Decoding a chunk of discrete action tokens: exactly, and as fast as the blocks allow. See docs/methods/decode.md."""

from burnish.methods.decode import auto, blocks, peers  # noqa: F401  fill the registry of decoders
from burnish.methods.decode.plan import DecodePlan
from burnish.policies.rows import DECODERS, make_decoder

__all__ = ["DECODERS", "DecodePlan", "make_decoder"]
