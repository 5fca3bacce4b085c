"""Progress by default: bars in a notebook, none in a script."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from pared.errors import ParedError
from pared.names import with_article
from pared.progress import Advance, Progress, Silent


class Bars:
    """Shows every stage as a bar of tqdm, which a notebook draws as one of its own, and notes as lines."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """Open a stage of ``total`` steps."""
        with _bar_class()(total=total, desc=name, unit=unit, leave=False) as bar:

            def advance(told: str = "", recalled: bool = False) -> None:  # noqa: ARG001 - as the protocol has it
                if told:
                    bar.set_postfix_str(told, refresh=False)
                bar.update()

            yield advance

    def note(self, message: str) -> None:
        """Write a note above the bars."""
        _bar_class().write(f"note: {message}", file=sys.stderr)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def watcher_of(progress: Progress | bool | None, function: str) -> Progress:
    """Return what reports progress.

    Args:
        progress: somebody, or whether bars are shown; none shows them in a notebook only.
        function: that it was handed to, for messages.

    Raises:
        ParedError: something that cannot watch.
    """
    if progress is None or isinstance(progress, bool):
        return Bars() if progress or (progress is None and in_notebook()) else Silent()
    if not (hasattr(progress, "stage") and hasattr(progress, "note")):
        raise ParedError(f"{function} takes an object with stage() and note() as progress, or whether bars are "
                         f"shown (True, False); got {with_article(type(progress).__name__)}")  # fmt: skip
    return progress


def _bar_class() -> Any:
    """Return tqdm's bar for where this runs; its widget needs ipywidgets, and warns without."""
    widgets = in_notebook() and importlib.util.find_spec("ipywidgets") is not None
    module = importlib.import_module("tqdm.auto" if widgets else "tqdm.std")
    return cast("Any", module).tqdm
