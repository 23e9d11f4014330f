"""Actions to token ids and back, in normalised units. Binned ids are time-major: position = step * A + dimension."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import MOST_BYTES, read_object, regular_file

_KNOWN = {"min": 0.0, "q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}
"""Quantiles of LeRobot's statistics, and their levels."""


FAST_FILES = ("tokenizer.json", "processor_config.json")
_LAST = 0xD7FF
"""Largest character that text may hold before those that stand for no character."""


class Bins(nn.Module):
    """Every action dimension is cut into bins; an id is the number of a bin, its action the middle of it.

    Args:
        action_dim: A.
        chunk_size: T.
        bins: V.

    Attributes:
        edges: [A, V + 1] in normalised units, rising; uniform over [-1, 1] unless `fit_quantiles` was called.
    """

    time_ordered = True

    def __init__(self, action_dim: int, chunk_size: int, bins: int):
        super().__init__()
        self.vocabulary, self.action_dim, self.length = bins, action_dim, chunk_size * action_dim
        self.register_buffer("edges", torch.linspace(-1, 1, bins + 1).repeat(action_dim, 1))

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """Edges stay out of half precision, in which one id in seven would be another one."""
        before = self.edges
        super()._apply(function, recurse)
        if self.edges.dtype in (torch.float16, torch.bfloat16):
            self.edges = before.to(self.edges.device)
        return self

    def fit_quantiles(self, stats: dict[str, Any], bounds: tuple[str, str]) -> None:
        """Bins that hold equally many actions each, as far as the stored quantiles tell (straight lines between).

        Args:
            stats: LeRobot statistics of "action": min, q01, q10, q50, q90, q99, max.
            bounds: the two of them that normalisation sends to -1 and 1.
        """
        missing = [name for name in _KNOWN if name not in stats]
        if missing:
            raise BurnishError(f"no statistic '{missing[0]}' of action", f"{', '.join(_KNOWN)} for quantile bins",
                               "tokenizer uniform")  # fmt: skip
        values = {name: np.asarray(stats[name], dtype=np.float64).flatten() for name in _KNOWN}
        low, high = values[bounds[0]], values[bounds[1]]
        known = 2 * (np.stack(list(values.values()), axis=1) - low[:, None]) / np.maximum(high - low, 1e-8)[:, None] - 1
        levels = np.linspace(0, 1, self.vocabulary + 1)
        edges = [np.interp(levels, list(_KNOWN.values()), np.maximum.accumulate(row)) for row in known]
        self.edges.copy_(torch.from_numpy(np.stack(edges)))

    @property
    def centres(self) -> Tensor:
        """[L, V] action of every id at every position."""
        middle = (self.edges[:, :-1] + self.edges[:, 1:]) / 2
        return middle.repeat(self.length // self.action_dim, 1)

    def encode(self, actions: Tensor) -> Tensor:
        """[B, T, A] normalised actions to ids [B, T * A]; what lies outside falls into the outermost bins.

        Quantile bins of an action that often has one value share that value as their edges: the middle one of them is
        taken, which is as narrow as the value, and not the last, which reaches to the next value.
        """
        columns = actions.to(self.edges.dtype).flatten(0, 1).T.contiguous()
        inner = self.edges[:, 1:-1].contiguous()
        ids = (torch.searchsorted(inner, columns) + torch.searchsorted(inner, columns, right=True) + 1) // 2
        return ids.T.reshape(len(actions), -1)

    def decode(self, ids: Tensor) -> Tensor:
        """[B, L] ids to normalised actions [B, T, A]."""
        chosen = self.centres.expand(len(ids), -1, -1).gather(2, ids[..., None])
        return chosen.view(len(ids), -1, self.action_dim)


class Fast(nn.Module):
    """FAST (arXiv 2501.09747): cosine transform over time, rounding, byte pairs; ids follow frequencies, not time.

    Reads the files that its authors publish, runs none of their code, and pads to a fixed length.

    Args:
        folder: holds tokenizer.json and processor_config.json (scale, min_token).
        length: L; ids past the end of a chunk's tokens are `vocabulary - 1`.
    """

    time_ordered = False

    def __init__(self, folder: str, action_dim: int, chunk_size: int, length: int):
        super().__init__()
        from tokenizers import Tokenizer

        files = [Path(folder) / name for name in FAST_FILES]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BurnishError(f"no {missing[0]} in {folder}", "the files of a FAST tokenizer", "tokenizer uniform")
        settings = read_object(files[1])
        self.scale, self.least = settings.get("scale"), settings.get("min_token")
        if not number(self.scale) or not 0 < self.scale <= 1e6 or type(self.least) is not int or abs(self.least) > 1e6:
            raise BurnishError(f"{files[1]} has scale {self.scale!r} and min_token {self.least!r}",
                               "a number above 0 and a whole one, both at most a million")  # fmt: skip
        try:
            self.pairs = Tokenizer.from_file(str(regular_file(files[0], most=MOST_BYTES)))
        except BurnishError:
            raise
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises no kind of its own
            raise BurnishError(f"{files[0]} is no tokenizer ({' '.join(str(error).split())[:200]})") from None
        self.action_dim, self.chunk_size, self.length = action_dim, chunk_size, length
        self.vocabulary = self.pairs.get_vocab_size() + 1

    def encode(self, actions: Tensor) -> Tensor:
        """[B, T, A] normalised actions to ids [B, L]."""
        rows = self.spell(actions)
        longest = max(map(len, rows))
        if longest > self.length:
            raise BurnishError(f"a chunk of {longest} FAST tokens", f"at most fast_length = {self.length}")
        pad = self.vocabulary - 1
        return torch.tensor([row + [pad] * (self.length - len(row)) for row in rows], device=actions.device)

    def spell(self, actions: Tensor) -> list[list[int]]:
        """The ids of each chunk of normalised actions [B, T, A], as many as it takes."""
        from scipy.fft import dct

        frequencies = np.rint(dct(actions.double().cpu().numpy(), axis=1, norm="ortho") * self.scale).astype(int)
        texts = ["".join(map(chr, np.clip(chunk.flatten() - self.least, 0, _LAST))) for chunk in frequencies]
        return [self.pairs.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Tensor) -> Tensor:
        """[B, L] ids to normalised actions [B, T, A], see `read`."""
        return self.read(ids.tolist()).to(ids.device)

    def read(self, rows: list[list[int]]) -> Tensor:
        """Normalised actions [B, T, A] of B lists of ids; those that spell too many numbers are cut, too few filled up
        with zeros, as FAST's authors do.
        """
        from scipy.fft import idct

        size = self.chunk_size * self.action_dim
        numbers = np.zeros((len(rows), size))
        for row, tokens in enumerate(rows):
            text = self.pairs.decode([t for t in tokens if t < self.vocabulary - 1], skip_special_tokens=False)
            spelled = [ord(letter) + self.least for letter in text][:size]
            numbers[row, : len(spelled)] = spelled
        actions = idct(numbers.reshape(-1, self.chunk_size, self.action_dim) / self.scale, axis=1, norm="ortho")
        return torch.from_numpy(actions).float()
