"""`pared doctor`: what an environment can do, and how it would load a folder."""

from pathlib import Path

from pared.entrypoints.doctor.finding import Diagnosis, Finding
from pared.entrypoints.doctor.machine import environment

__all__ = ["Diagnosis", "Finding", "examine"]


def examine(folder: str | Path | None = None) -> Diagnosis:
    """Look at this environment, and at how it would load a folder; nothing is loaded.

    Args:
        folder: of a model, compressed or not; none for the environment alone.

    Raises:
        ParedError: there is no such folder.
    """
    if folder is None:
        return Diagnosis(tuple(environment()))
    from pared.entrypoints.doctor.stored import Stored

    stored, here = Stored.read(folder), tuple(environment())
    if any(one.state == "wrong" for one in here):  # torch or transformers may not be importable
        return Diagnosis(here, str(folder))
    from pared.entrypoints.doctor.folder import loading

    return Diagnosis(here, str(folder), tuple(loading(stored)))
