"""Weights and observations in closed form, for our code and the released one alike; needs torch and nothing of ours."""

import zlib

import torch

TASKS = ["pick up the red cube", "Open the drawer and then put the green ball on it"]
VOCABULARY, EMPTY, STATE_DIM, SIZES = 32000, 29871, 8, ((28, 28), (40, 52))
OWN = {"cameras": ["main", "wrist"], "chunk_size": 8, "normalization": "bounds_q99", "image_shape": [28, 28]}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of about the size of trained ones, by the tensor's name; words are less likely than actions."""
    count = torch.Size(shape).numel()
    at = torch.arange(count, dtype=torch.float64) * 0.7548776662 + zlib.crc32(name.encode()) % 997
    wave = torch.sin(at * (1 + at / 7919)).reshape(shape)
    if len(shape) < 2 or "norm" in name:
        start = 0.0 if name.endswith("bias") else 1.0
        return (start + 0.1 * wave).float()
    if "lm_head" in name:
        wave[: VOCABULARY - 256] *= 0.2
        wave[VOCABULARY:] *= 0.2
    wide = "embed" in name or "latent" in name or "token" in name
    return (wave * (0.5 if wide else (2.0 / torch.Size(shape[1:]).numel()) ** 0.5)).float()


def image(number: int, height: int, width: int) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    i, j, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    wave = torch.sin(i * 0.31 + number) + torch.cos(j * 0.23 - c) + torch.sin((i + 1) * (j + 2) * 0.013 * (c + 1))
    return (127.5 + 42 * wave).round().clamp(0, 255).to(torch.uint8)


def numbers(number: int, *shape: int) -> torch.Tensor:
    """float32, of size 1."""
    at = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(at * 1.618 + 0.7 * number).reshape(shape).float()


def norm_stats(dims: int, gripper: bool) -> dict:
    """A table of one kind of vector, with a mask that leaves out the last dimension where it is a gripper."""
    low = [round(-0.5 - 0.1 * i, 3) for i in range(dims)]
    high = [round(0.7 + 0.05 * i, 3) for i in range(dims)]
    table = {"min": [x - 0.2 for x in low], "max": [x + 0.2 for x in high], "q01": low, "q99": high}
    table |= {"mean": [0.1] * dims, "std": [0.4] * dims}
    return {**table, "mask": [True] * (dims - 1) + [not gripper]}
