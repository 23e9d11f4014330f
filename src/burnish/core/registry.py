"""One decorator registry for everything that plugs in: environments, objectives, policies, benches."""

from collections.abc import Callable, Iterator

from burnish.core.errors import BurnishError


class Registry[T]:
    """Maps a name to a class or function.

    >>> OBJECTIVES = Registry("objective")
    >>> @OBJECTIVES.register("l2sp")
    ... class L2SP: ...
    >>> OBJECTIVES.get("l2sp") is L2SP
    True
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its argument under `name`; a second entry of that name is an error."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; raises BurnishError that lists the known names."""
        if name not in self._entries:
            raise BurnishError(f"unknown {self.kind} '{name}'", f"one of {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries
