"""Something to do when a module of another library is imported, be that already done or still to come.

This file is a part of the loader that a saved folder carries, so it may use the standard library only.
"""

import importlib
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call an action with a module: now where it is imported, else right after it is.

    Called once, however often it is registered, in the thread that imports the module and before its importers
    continue. Where it fails, the import succeeds all the same, with a warning.

    Args:
        name: full name of the module.
        action: what to do; imports nothing that is itself waiting for the module.
    """
    with _lock:
        if name not in sys.modules:
            _waiting.setdefault(name, {})[action] = None
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    action(importlib.import_module(name))  # waits for another thread that is in the middle of it


class _Finder:  # not one of importlib.abc, which takes as long to import as all of pared
    """Finds modules that are waited for as the finders behind it do, and puts the actions behind their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module that is waited for."""
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find: Any = getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Acting(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Acting:
    """A loader that makes way for the real one, and then acts."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create as the real one does."""
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Execute as the real one does, and do what waits for it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        with _lock:
            actions = _waiting.pop(module.__name__, {})
        for action in actions:
            try:
                action(module)
            except Exception as error:
                warnings.warn(f"{module.__name__}: pared could not set itself up ({error!r})", stacklevel=2)


_lock = threading.Lock()
_waiting: dict[str, dict[Action, None]] = {}
_finder = _Finder()
