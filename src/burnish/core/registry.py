"""One registry for what plugs in: policies, environments, teachers, decoders, samplers, merge operators, objectives.

An entry is one file of the registry's room that registers itself with the decorator. Nothing is imported before it is
asked for: `get("lift")` first looks for a file of that name, then reads the whole room, then asks the entry points of
installed packages. So a new entry edits no other file, and a package from outside needs one entry point.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pkgutil import iter_modules

from burnish.core.errors import BurnishError


class Registry[T]:
    """Maps a name to a class or function.

    Args:
        kind: what an entry is called in messages.
        room: package whose files register entries; "" where every entry is registered by hand.
        by_path: whether a name may be "package.module:Class", which is imported. Only for names that come from a recipe
            of the user: a policy folder names its type and decoder, and may not choose what is imported.
        module: file of a sub-package that registers (a method's folder has its `objective`); "" for the package itself.

    The entry-point group of outside packages is "burnish.<kind>s" ("burnish.objectives", "burnish.merge_operators").

    >>> OBJECTIVES = Registry("objective")
    >>> @OBJECTIVES.register("l2sp")
    ... class L2SP: ...
    >>> OBJECTIVES.get("l2sp") is L2SP
    True
    """

    def __init__(self, kind: str, room: str = "", module: str = "", by_path: bool = False):
        self.kind, self.room, self.module, self.by_path = kind, room, module, by_path
        self.group = "burnish." + kind.replace(" ", "_").removesuffix("y") + ("ies" if kind.endswith("y") else "s")
        self._entries: dict[str, T] = {}
        self._read = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that files its argument under each of `names`; a second entry of a name is an error."""

        def add(entry: T) -> T:
            for name in names:
                if self._entries.get(name, entry) is not entry:
                    raise ValueError(f"{self.kind} '{name}' is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`, or with `by_path` a class by its path; BurnishError where there is none."""
        if self.by_path and ":" in name:
            module, _, attribute = name.partition(":")
            try:
                return getattr(import_module(module), attribute)
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                found = f"{self.kind} '{name}' cannot be imported ({error})"
                raise BurnishError(found, "package.module:Class") from error
        if not self._find(name):
            raise BurnishError(f"unknown {self.kind} {name!r}", f"one of {', '.join(self)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """All names in order, those of outside packages too (which are not imported for it)."""
        self._read_room()
        return iter(sorted(self._entries.keys() | {point.name for point in self._outside()}))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name)

    def _find(self, name: str) -> bool:
        if name not in self._entries and self.room and name.isidentifier() and find_spec(f"{self.room}.{name}"):
            self._import(name)
        if name not in self._entries:
            self._read_room()
        if name not in self._entries:
            for point in self._outside():
                if point.name == name:
                    self.register(name)(self._load(point))
        return name in self._entries

    def _read_room(self) -> None:
        if self.room and not self._read:
            self._read = True
            for found in iter_modules(import_module(self.room).__path__):
                self._import(found.name)

    def _import(self, name: str) -> None:
        path = f"{self.room}.{name}"
        spec = find_spec(path)
        if self.module and spec is not None and spec.submodule_search_locations is not None:
            path += f".{self.module}"
        if find_spec(path):
            import_module(path)

    def _outside(self) -> list[EntryPoint]:
        return [point for point in entry_points(group=self.group) if point.name not in self._entries]

    def _load(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            whose = point.dist.name if point.dist else point.value
            raise BurnishError(f"{self.kind} '{point.name}' of {whose} cannot be imported ({error})") from error
