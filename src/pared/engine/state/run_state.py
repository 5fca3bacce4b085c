"""How far a compression has come, on disk: what every pass made of every block, to resume from after a kill.

A block is finished when its line is in the journal. Its files are written before, so that a file counts only when the
line that names it is there; what an earlier pass wrote of the block may go after. So at whatever moment a process
ends, what the next one finds is what was recorded up to some line.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pared.environment import peak_memory_bytes
from pared.errors import ParedError
from pared.io.digests import sha256_of
from pared.io.run_dir import RunDirectory
from pared.progress import Stopwatch

FILES = "pass-*.safetensors"
HEADER_BYTES = 2**16  # of a file of tensors, about


class CompressionRun:
    """What the passes of one compression have finished.

    Passes have names, as ``pass-2``, which the names of their files begin with: ``pass-2-block-00012.safetensors``.
    Results that are not of a block (the plan, a perplexity) are kept by a name of their own.

    Args:
        directory: that holds the state; a temporary one if nothing need outlive the process.

    Attributes:
        earlier: what the processes that this one resumes from took until their last line, in order: ``seconds`` by
            stage, and the highest ``peak`` of memory in bytes.

    Raises:
        ParedError: a line or a file is damaged or missing; names it, and nothing is changed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._blocks: dict[str, dict[int, dict[str, Any]]] = {}
        self._values: dict[str, Any] = {}
        self._files: dict[str, dict[str, Any]] = {}  # what lines tell of files that are needed, by name
        self._instead: dict[str, str] = {}  # the file that took the place of one that was dropped, by its name
        self._verified = set[str]()
        self._spent: dict[int, dict[str, Any]] = {}  # by number of the process: what its last line says it took so far
        self._watches: list[Stopwatch] = []
        for number, entry in enumerate(directory.journal.entries, 2):
            self._take(entry, f"journal {directory.journal.path}, line {number}")
        for told in self._files.values():
            self._require_there(told)
        self.earlier = tuple(self._spent.values())
        for path in directory.folder.glob(FILES):
            if (
                path.name not in self._files
            ):  # written and not recorded, or dropped and not removed, when a process ended
                path.unlink()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._directory.folder

    @property
    def durable(self) -> bool:
        """Whether what is recorded outlives this process."""
        return self._directory.durable

    def finished(self, pass_name: str) -> frozenset[int]:
        """Return the indices of the blocks that a pass has finished."""
        return frozenset(self._blocks.get(pass_name, ()))

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any] | None = None) -> Path:
        """Write a file, whole and on the disk; it counts once a line names it.

        Args:
            name: of the file; begins with that of the pass, ends with ``.safetensors``.
            tensors: what it holds.
            notes: plain data that its header holds, under ``pared``.

        Raises:
            ParedError: it cannot be written, as the disk is full; all that was recorded before is as it was.
        """
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + HEADER_BYTES
        with self._directory.commit_file(name, needed) as path:
            save_file(dict(_apart(tensors)), path, {"pared": json.dumps(notes or {})})
        self._verified.add(name)
        return self.folder / name

    def record(
        self,
        pass_name: str,
        index: int,
        fields: Mapping[str, Any],
        files: Iterable[Path] = (),
        drops: Iterable[Path] = (),
    ) -> None:
        """Have it on the disk that a pass has finished a block; what it recorded of it before is forgotten.

        Args:
            pass_name: of the pass.
            index: of the block.
            fields: what the pass found of it, as JSON has it.
            files: what it made of it; in the folder, and on the disk.
            drops: files of earlier passes that are no longer needed, which go.

        Raises:
            ParedError: it cannot be written, as the disk is full; all that was recorded before is as it was.
        """
        dropped = [path.name for path in drops]
        line: dict[str, Any] = {"pass": pass_name, "block": index, "fields": dict(fields)}
        line |= {"files": [self._describe(path) for path in files]}
        self._append(line | ({"drops": dropped} if dropped else {}))
        for name in dropped:
            (self.folder / name).unlink(missing_ok=True)

    def fields(self, pass_name: str, index: int) -> dict[str, Any]:
        """Return what a pass found of a block that it has finished."""
        found: dict[str, Any] = self._blocks[pass_name][index]["fields"]
        return found

    def files(self, pass_name: str, index: int) -> list[Path]:
        """Return the files of what a pass made of a block, without those that were dropped since.

        They are checked the first time that they are asked for.

        Raises:
            ParedError: one is missing or damaged.
        """
        names = [told["name"] for told in self._blocks[pass_name][index]["files"]]
        return [self._checked(self._files[name]) for name in names if name in self._files]

    def newest(self, name: str) -> Path | None:
        """Return a file, or what took its place if it was dropped; none if no line tells of it.

        Raises:
            ParedError: it is missing or damaged.
        """
        while name in self._instead:
            name = self._instead[name]
        return self._checked(self._files[name]) if name in self._files else None

    def put(self, name: str, value: Any) -> None:
        """Have a result on the disk that is not of a block; a later one of the same name takes its place.

        Args:
            name: of it: ``plan``.
            value: as JSON has it.

        Raises:
            ParedError: it cannot be written.
        """
        self._append({"name": name, "value": value})

    def get(self, name: str) -> Any:
        """Return a result that was put, None if none was."""
        return self._values.get(name)

    def time_by(self, watch: Stopwatch) -> None:
        """Have a stopwatch's seconds in every line from now on."""
        self._watches.append(watch)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.durable:
            seconds = _sums(watch.so_far() for watch in self._watches)
            spent = {"process": len(self.earlier) + 1, "seconds": seconds, "peak": peak_memory_bytes()}
            line = {**line, "spent": spent}
        self._directory.journal.append(line)
        self._take(self._directory.journal.entries[-1], "")

    def _describe(self, path: Path) -> dict[str, Any]:
        told: dict[str, Any] = {"name": path.name, "bytes": path.stat().st_size}
        return told | ({"sha256": sha256_of(path)} if self.durable else {})

    def _take(self, entry: Mapping[str, Any], where: str) -> None:
        """Take up a line of the journal."""
        if "spent" in entry:
            self._spent[entry["spent"]["process"]] = entry["spent"]
        if "name" in entry and "value" in entry:
            self._values[str(entry["name"])] = entry["value"]
        elif {"pass", "block", "fields", "files"} <= entry.keys():
            self._blocks.setdefault(entry["pass"], {})[entry["block"]] = dict(entry)
            self._files |= {told["name"]: told for told in entry["files"]}
            for name in entry.get("drops", ()):
                self._files.pop(name, None)
                self._instead[name] = entry["files"][-1]["name"]
        else:
            raise ParedError(f"{where}: not a line of a compression; {self._advice()}")

    def _checked(self, told: Mapping[str, Any]) -> Path:
        path = self.folder / told["name"]
        if path.name not in self._verified:
            self._require_there(told)
            if "sha256" in told and sha256_of(path) != told["sha256"]:
                raise ParedError(f"{path} is damaged: its SHA-256 is not what was recorded; {self._advice()}")
            self._verified.add(path.name)
        return path

    def _require_there(self, told: Mapping[str, Any]) -> None:
        path = self.folder / told["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != told["bytes"]:
            is_now = "is missing" if found is None else f"has {found:,} bytes, expected {told['bytes']:,}"
            raise ParedError(f"{path} {is_now}; {self._advice()}")

    def _advice(self) -> str:
        return f"restore it, or remove {self.folder} to start over"


def spent(earlier: Iterable[Mapping[str, Any]], seconds: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """Return the seconds of several processes by stage, and the highest memory of the earlier ones, in bytes.

    Args:
        earlier: as of :class:`CompressionRun`.
        seconds: of this process.
    """
    before = list(earlier)
    return _sums([*(one["seconds"] for one in before), seconds]), max((one["peak"] for one in before), default=0)


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _apart(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they can be written: whole, on the CPU, and none in the memory of another."""
    seen = set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        yield name, plain.clone() if place in seen else plain
        seen.add(place)
