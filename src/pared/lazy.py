"""Packages whose names are imported when they are first used, so that ``import pared`` costs next to nothing.

torch and transformers take seconds to import. What can be answered or refused without them (the version, the list of
methods, a misspelt option) must not wait for them.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package that knows where its names are at home."""

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        home = self.__dict__.get("_homes", {}).get(name)
        if home is None:
            return self._submodule(name)
        value = getattr(importlib.import_module(home), name)
        self.__dict__[name] = value
        return value

    def _submodule(self, name: str) -> ModuleType:
        """Import a part of the package: there without an import of its own, as in a package that imports everything."""
        full = f"{self.__name__}.{name}"
        if name.startswith("_") or not name.isidentifier() or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return importlib.import_module(full)

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each submodule to its package. Where a submodule is called as what it exports
        # (``checkpoint.verify``), the export goes before it, as it does in a package that imports everything.
        if not (isinstance(value, ModuleType) and name in self._homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Return what the package promises, and nothing that it is made of."""
        return sorted(self._homes)


def lazy_package(package: str, exports: Mapping[str, Sequence[str]]) -> None:
    """Make a package import each of its names on first use.

    Type checkers read the imports that the package makes under ``TYPE_CHECKING``; a test holds both against each other.

    Args:
        package: its ``__name__``.
        exports: the names by the module they come from.
    """
    module = sys.modules[package]
    module.__dict__["_homes"] = {name: home for home, names in exports.items() for name in names}
    module.__class__ = _LazyPackage


def deferred(path: str) -> Callable[..., Any]:
    """Return a function that is imported when it is first called.

    Args:
        path: as in an entry point, ``package.module:function``.
    """

    @cache
    def resolve() -> Callable[..., Any]:
        found: Callable[..., Any] = pkgutil.resolve_name(path)
        return found

    def call(*args: Any, **kwargs: Any) -> Any:
        return resolve()(*args, **kwargs)

    call.__name__ = call.__qualname__ = path.rpartition(":")[2]
    call.path = path  # type: ignore[attr-defined]
    return call
