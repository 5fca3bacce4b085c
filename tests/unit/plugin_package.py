"""Packages that are installed for a test: a module and its metadata in a folder, no installer and no network."""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pared.allocation import ALLOCATORS
from pared.methods import METHODS


def install(
    place: Path, package: str, code: str, entries: Mapping[str, Mapping[str, str]], version: str = "1.0"
) -> Path:
    """Write a package of one module.

    Args:
        place: a folder that is, or will be, on the path.
        package: name of the package and of its module.
        code: of the module.
        entries: what it adds.
        version: of the package.
    """
    place.mkdir(exist_ok=True)
    (place / f"{package}.py").write_text(textwrap.dedent(code))
    metadata = place / f"{package}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    sections = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in entries.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(sections))
    return place


@contextmanager
def installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the packages of a folder installed for the length of a ``with`` block."""
    modules = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(place)
        METHODS.refresh()
        ALLOCATORS.refresh()
        try:
            yield
        finally:
            for name in set(sys.modules) - modules:
                if (place / f"{name}.py").exists():
                    del sys.modules[name]
    METHODS.refresh()
    ALLOCATORS.refresh()
