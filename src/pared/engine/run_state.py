"""How far a compression has come, on disk: what every pass made of every block, to go on from after a kill.

A block is finished when its line is in the journal. Its tensors are written before, so that a file counts only when
the line that names it is there; what an earlier pass wrote of the block may go after. So at whatever moment a process
ends, what the next one finds is what was recorded up to some line.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pared.errors import ParedError
from pared.io.digests import sha256_of
from pared.io.run_dir import RunDirectory

PASS = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
FILES = "*-block-*.safetensors"
HEADER_BYTES = 2**16  # of a file of tensors, about


class CompressionRun:
    """What the passes of one compression have finished.

    Passes have names, as ``pass-2``, which name their files too: ``pass-2-block-00012.safetensors``. Results that are
    not of a block (the plan, a perplexity) are kept by a name of their own.

    Args:
        directory: that holds the state; a temporary one if nothing need outlive the process.

    Raises:
        ParedError: a line or a file is damaged or missing; names it, and nothing is changed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._blocks: dict[str, dict[int, dict[str, Any]]] = {}
        self._values: dict[str, Any] = {}
        self._verified = set[str]()
        for number, entry in enumerate(directory.journal.entries, 2):
            self._take(entry, f"journal {directory.journal.path}, line {number}")
        for _, line in self._lines():
            self._require_there(line)
        kept = {line["file"] for _, line in self._lines()}
        for path in directory.folder.glob(FILES):
            if path.name not in kept:  # written and not recorded, or replaced and not removed, when a process ended
                path.unlink()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._directory.folder

    def finished(self, pass_name: str) -> int:
        """Return how many blocks a pass has finished."""
        return len(self._blocks.get(pass_name, ()))

    def record(
        self,
        pass_name: str,
        index: int,
        fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor] | None = None,
        replaces: str | None = None,
    ) -> None:
        """Have it on the disk that a pass has finished a block.

        Args:
            pass_name: of the pass.
            index: of the block.
            fields: what the pass found of it, as JSON has it.
            tensors: what it made of it, by name; without any there is no file.
            replaces: an earlier pass whose file of this block is no longer needed.

        Raises:
            ParedError: it cannot be written, as the disk is full; all that was recorded before is as it was.
        """
        assert PASS.fullmatch(pass_name), pass_name
        assert index not in self._blocks.get(pass_name, ()), f"{pass_name} has finished block {index} already"
        line: dict[str, Any] = {"pass": pass_name, "block": index, "fields": dict(fields)}
        if tensors:
            line |= self._write(f"{pass_name}-block-{index:05}.safetensors", tensors)
        if replaces is not None:
            line["replaces"] = replaces
        try:
            self._directory.journal.append(line)
        except BaseException:
            if "file" in line:
                (self.folder / line["file"]).unlink(missing_ok=True)
            raise
        old = self._blocks.get(replaces or "", {}).get(index, {}).get("file")
        self._take(self._directory.journal.entries[-1], "")
        if old is not None:
            (self.folder / old).unlink(missing_ok=True)

    def fields(self, pass_name: str, index: int) -> dict[str, Any]:
        """Return what a pass found of a block that it has finished."""
        found: dict[str, Any] = self._blocks[pass_name][index]["fields"]
        return found

    def tensors(self, pass_name: str, index: int) -> dict[str, torch.Tensor]:
        """Return what a pass made of a block that it has finished, on the CPU; nothing if it made nothing.

        Raises:
            ParedError: the file is missing or damaged.
        """
        path = self.file(pass_name, index)
        if path is None:
            return {}
        try:
            found: dict[str, torch.Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ParedError(f"{path} is not readable ({error}); {self._advice()}") from None
        return found

    def file(self, pass_name: str, index: int) -> Path | None:
        """Return the file of what a pass made of a block, checked the first time; None if it made nothing.

        Raises:
            ParedError: the file is missing or damaged.
        """
        line = self._blocks[pass_name][index]
        if "file" not in line:
            return None
        path = self.folder / line["file"]
        if path.name not in self._verified:
            self._require_there(line)
            if "sha256" in line and sha256_of(path) != line["sha256"]:
                raise ParedError(f"{path} is damaged: its SHA-256 is not what was recorded; {self._advice()}")
            self._verified.add(path.name)
        return path

    def put(self, name: str, value: Any) -> None:
        """Have a result on the disk that is not of a block; a later one of the same name takes its place.

        Args:
            name: of it: ``plan``.
            value: as JSON has it.

        Raises:
            ParedError: it cannot be written.
        """
        self._directory.journal.append({"name": name, "value": value})
        self._take(self._directory.journal.entries[-1], "")

    def get(self, name: str) -> Any:
        """Return a result that was put, None if none was."""
        return self._values.get(name)

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Write a file, and return what a line tells of it."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + HEADER_BYTES
        with self._directory.commit_file(name, needed) as path:
            save_file(dict(_apart(tensors)), path)
        path = self.folder / name
        told: dict[str, Any] = {"file": name, "bytes": path.stat().st_size}
        if self._directory.durable:
            told["sha256"] = sha256_of(path)
        self._verified.add(name)
        return told

    def _take(self, entry: Mapping[str, Any], where: str) -> None:
        """Take up a line of the journal."""
        if "name" in entry and "value" in entry:
            self._values[str(entry["name"])] = entry["value"]
        elif "pass" in entry and "block" in entry and "fields" in entry:
            replaced = self._blocks.get(entry.get("replaces", ""), {}).get(entry["block"], {})
            for key in ("file", "bytes", "sha256"):
                replaced.pop(key, None)
            self._blocks.setdefault(entry["pass"], {})[entry["block"]] = dict(entry)
        else:
            raise ParedError(f"{where}: not a line of a compression; {self._advice()}")

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every finished block that has a file, with its line."""
        for blocks in self._blocks.values():
            yield from ((index, line) for index, line in blocks.items() if "file" in line)

    def _require_there(self, line: Mapping[str, Any]) -> None:
        path = self.folder / line["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != line["bytes"]:
            told = "is missing" if found is None else f"has {found:,} bytes, expected {line['bytes']:,}"
            raise ParedError(f"{path} {told}; {self._advice()}")

    def _advice(self) -> str:
        return f"restore it, or remove {self.folder} to begin anew"


def _apart(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they can be written: whole, on the CPU, and none in the memory of another."""
    seen = set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        yield name, plain.clone() if place in seen else plain
        seen.add(place)
