"""What can be registered by name: what is built in, and what installed packages add through entry points.

A package adds something by naming it in its own metadata, under the group that the registry reads:

    [project.entry-points."pared.methods"]
    my-method = "my_package:METHOD"

The metadata of what is installed is read when a registry is first asked; the package itself is imported when what it
adds is asked for by name, or when all there is gets listed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from pared.errors import ParedError
from pared.names import require_known

T = TypeVar("T")


log = logging.getLogger(__name__)


class PluginError(ParedError):
    """An installed package adds something that cannot be used."""


class Registry(Mapping[str, T], Generic[T]):
    """Things by name: what is built in, what entry points of one group add, and what is registered by a call.

    As a mapping it holds all names, those of packages that turn out to be broken too: ``registry[name]`` imports what
    it must and raises a :class:`PluginError` for those; :meth:`available` leaves them out, and each is logged once.

    Args:
        what: one of them is, in the singular: ``method``.
        group: of entry points.
        builtin: what pared has itself, by name.
        read: from a name and the object an entry point names to the thing.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, T], read: Callable[[str, object], T]) -> None:
        self.what, self.group = what, group
        self._builtin = dict(builtin)
        self._registered: dict[str, T] = {}  # by hand
        self._read = read
        self._loaded: dict[str, T] = {}
        self._warned: set[str] = set()

    @cached_property
    def _entries(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name; more than one where packages contradict each other."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            if entry not in found.setdefault(entry.name, []):  # a package may be found twice on the path
                found[entry.name].append(entry)
        return dict(sorted(found.items()))

    @property
    def _used(self) -> dict[str, list[EntryPoint]]:
        """The entry points whose names pared has not itself."""
        return {name: entries for name, entries in self._entries.items() if name not in self._builtin}

    def _warn_of_unused(self, *names: str) -> None:
        """Tell which packages add, under these names, what is never used."""
        for name in names:
            if name in self._builtin and name in self._entries:
                package = _package_of(self._entries[name][0])
                self._warn(f"{self.what} {name!r} of {package} is not used: pared has one of that name; rename it")

    def register(self, name: str, thing: object) -> None:
        """Add something for the length of this process, as an installed package would.

        Raises:
            ParedError: the name is taken, or it is nothing that can be registered here.
        """
        if name in self:
            raise ParedError(f"{self.what} {name!r} is there already; give yours another name, or unregister it first")
        try:
            self._registered[name] = self._read(name, thing)
        except ValueError as error:
            raise ParedError(f"{self.what} {name!r}: {error}") from None

    def unregister(self, name: str) -> None:
        """Take away what :meth:`register` added.

        Raises:
            ParedError: it added nothing of that name.
        """
        if name not in self._registered:
            there = " was not registered by hand" if name in self else " is not there"
            raise ParedError(f"{self.what} {name!r}{there}; only what was registered by hand can be taken away: "
                             f"{', '.join(self._registered) or 'nothing was'}")  # fmt: skip
        del self._registered[name]

    def refresh(self) -> None:
        """Read again what is installed."""
        self.__dict__.pop("_entries", None)
        self._loaded.clear()

    def __getitem__(self, name: str) -> T:
        """Return what a name stands for.

        Raises:
            KeyError: nothing.
            PluginError: a package that adds it is broken, or several add it.
        """
        for own in (self._builtin, self._registered):
            if name in own:
                return own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._registered or name in self._entries

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._registered
        yield from (name for name in self._used if name not in self._registered)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def find(self, name: str) -> T:
        """Return what a user calls by a name.

        Raises:
            ParedError: there is nothing of that name, with the nearest there is; or the package that adds it is broken.
        """
        require_known(self.what, name, self)
        self._warn_of_unused(name)
        return self[name]

    def available(self) -> dict[str, T]:
        """Return all that can be used, by name; what a package adds and cannot be used is left out and logged."""
        found: dict[str, T] = {}
        self._warn_of_unused(*self._entries)
        for name in self:
            try:
                found[name] = self[name]
            except PluginError as error:
                self._warn(str(error))
        return found

    def package_of(self, name: str) -> str:
        """Return the package that adds something, with its version; empty for what is built in."""
        by_hand = name in self._registered
        return _package_of(self._used[name][0]) if name in self._used and not by_hand else ""

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            log.warning("%s", problem)

    def _load(self, name: str) -> T:
        if name not in self._entries:
            raise KeyError(name)
        first, *others = self._entries[name]
        if others:
            packages = ", ".join(_package_of(entry) for entry in (first, *others))
            raise PluginError(f"{self.what} {name!r} is added by several packages: {packages}; uninstall all but one")
        where = f"{self.what} {name!r} of {_package_of(first)} ({first.value})"
        try:
            found: object = first.load()
        except (Exception, SystemExit) as error:  # whatever a package does when it is imported
            told = " ".join(str(error).split())
            raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {told}; update or uninstall it "
                              "and try again") from error  # fmt: skip
        try:
            return self._read(name, found)
        except ValueError as error:
            raise PluginError(f"{where}: {error}") from None


def _package_of(entry: EntryPoint) -> str:
    """Return the name and version of the package that an entry point is of."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module
