"""The actions that a robot executes while it waits for the next chunk: counted, never timed.

A chunk that was asked for at control step k begins with the action of step k. When it comes, n rows have been executed
since, and row n is the next one: n is counted here and not derived from a clock, which would drop rows of a robot that
stood still. Steps are executed rows; moments at which there was nothing to execute do not count as such.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.core.errors import BurnishError

RECENT = 50
"""Delays from which the next one is predicted; older ones are forgotten, so that a spike is too."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request for a chunk.

    Args:
        step: executed rows so far, k.
        rows: Y [n, A], what the robot goes on to do from step k, the old chunk's rest; never filled up.
        delay: rows that will have been executed when the answer comes, predicted; at most n.
    """

    step: int
    rows: np.ndarray
    delay: int


class ActionQueue:
    """Rows of one chunk after another.

    Args:
        relative: bool [A], dimensions whose zero means no motion (`idle`); the others repeat the last command.
        first: steps of delay that are predicted while none is known.

    Attributes:
        executed: rows handed out.
        starved: times that there was none.
        commit_error: largest difference between a row that was executed and the one at its place in the chunk that
            goes on behind it; 0 where every chunk was conditioned on what was done.
        delays: counted of the last chunks, steps without a row among them; not of those that bridged nothing.
    """

    def __init__(self, relative: Sequence[bool] = (), first: int = 0) -> None:
        self.relative, self.first, self.commit_error = np.asarray(relative, bool), first, 0.0
        self.executed = self.starved = self._starved = 0
        self.delays: deque[int] = deque(maxlen=RECENT)
        self.clear()

    def clear(self) -> None:
        """Forget the chunk, as at the start of an episode; an answer that is on its way is then refused."""
        self._rows, self._base = np.zeros((0, 0), np.float32), self.executed
        self._done: list[np.ndarray] = []
        self._asked: Asked | None = None
        self._last: np.ndarray | None = None

    @property
    def left(self) -> int:
        """Rows that wait."""
        return max(0, self._base + len(self._rows) - self.executed)

    def pop(self) -> np.ndarray | None:
        """The row [A] to execute now; None where there is none (see `idle`), which does not count as a step."""
        if not self.left:
            self.starved += 1
            return None
        row = self._rows[self.executed - self._base]
        self.executed += 1
        self._last = row
        if self._asked is not None:
            self._done.append(row)
        return row

    def idle(self) -> np.ndarray:
        """What keeps a robot without rows where it is: no motion where commands are relative, else the last command.

        Raises:
            BurnishError: nothing was executed yet in this episode, so that there is no command to repeat.
        """
        if self._last is None:
            raise BurnishError("an idle action before the first row", "the first chunk, for which the robot waits")
        return np.where(self.relative, 0, self._last) if len(self.relative) else self._last

    def predict(self) -> int:
        """Steps that the next answer will take: the 95th percentile of the last ones."""
        return int(np.quantile(self.delays, 0.95, method="higher")) if self.delays else self.first

    def ask(self, predict: Callable[[], int] | None = None) -> Asked:
        """Note that a chunk is asked for on the observation of now; it replaces an earlier request."""
        rows = self._rows[self.executed - self._base :] if self.left else self._rows[:0]
        self._asked = Asked(self.executed, rows, max(0, min((predict or self.predict)(), len(rows))))
        self._done, self._starved = [], self.starved
        return self._asked

    def splice(self, chunk: np.ndarray, asked: Asked) -> float | None:
        """Go on with `chunk` [T, A], which `asked` asked for, behind what has been executed since.

        A robot that had nothing to execute begins with row 0, because its count has not moved.

        Returns:
            The largest difference between the rows executed since and those of the chunk in their places; None where
            the answer is to a request that `clear` or a later `ask` has replaced, and is not taken.

        Raises:
            BurnishError: `relative` is of another width than the chunk.
        """
        if asked is not self._asked:
            return None
        if len(self.relative) not in (0, chunk.shape[1]):  # now, and not when the robot has run out of rows
            raise BurnishError(f"relative with {len(self.relative)} flags", f"{chunk.shape[1]}, one for each action")
        done = self._done[: len(chunk)]
        error = float(np.abs(np.stack(done) - chunk[: len(done)]).max()) if done else 0.0
        delay = self.executed - asked.step + self.starved - self._starved
        if len(asked.rows) or delay:
            self.delays.append(delay)
        self.commit_error = max(self.commit_error, error)
        self._rows, self._base, self._asked, self._done = chunk, asked.step, None, []
        return error
