"""The state of a compression beside its output: opened once it is known what the result depends on, gone at the end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pared.calibration.staged import Blocks
from pared.data.windows import Windows
from pared.engine.spec import CompressionSpec
from pared.engine.state.run_state import CompressionRun
from pared.entrypoints.evaluation.measure import PerplexityOn
from pared.environment import device_of, versions
from pared.io.digests import sha256_of
from pared.io.fingerprint import as_json
from pared.io.record import MANIFEST
from pared.io.run_dir import COMPRESSION, RunDirectory, run_folder, settings_of
from pared.models.source import ModelSource
from pared.names import called
from pared.progress import Progress

KIND = COMPRESSION
STREAMED, PUBLISHED = "block by block", "published"  # names in the state
# What a compressed model does not depend on: where it goes, what it is measured on, and what its source is called.
LEFT_OUT = {"out", "evaluation", "model", "stream", "activation_memory", "device"}


class Resumable:
    """A compression whose state outlives a process that is killed.

    Args:
        out: the output.
        resume: whether to resume from what an earlier process left, or to remove it; None refuses both.
        progress: what reports progress.
    """

    def __init__(self, out: Path, resume: bool | None, progress: Progress) -> None:
        self._out, self._resume, self._progress = out, resume, progress
        self._stack = ExitStack()
        self._directory: RunDirectory | None = None
        self._run: CompressionRun | None = None

    @classmethod
    @contextmanager
    def beside(cls, out: Path, resume: bool | None, progress: Progress) -> Iterator["Resumable"]:
        """Hold the state until the output is there, when it is removed; what fails or is interrupted leaves it."""
        one = cls(out, resume, progress)
        with one._stack:
            try:
                yield one
            except BaseException:
                one._tell()
                raise
            if one._directory is not None:
                one._directory.finish()

    @property
    def streamed(self) -> bool | None:
        """Whether the process that this one resumes from read the model block by block; None where there was none."""
        found = settings_of(run_folder(self._out, KIND)) if self._resume is not False else None
        return None if found is None else bool(found.get(STREAMED))

    def publishing(self, folder: Path) -> None:
        """Note which folder takes its place next: if it is there the run was done, though its state is there too."""
        assert self._run is not None
        self._run.put(PUBLISHED, sha256_of(folder / MANIFEST))

    def open(self, fingerprint: Mapping[str, Any]) -> CompressionRun:
        """Return what an earlier process of this very compression has finished, and what this one will.

        Raises:
            ParedError: the state is that of another compression, damaged, or another process works in it.
        """
        opened = RunDirectory.open(self._out, KIND, fingerprint, self._resume)
        directory = self._stack.enter_context(opened)
        run = CompressionRun(directory)
        self._directory, self._run = directory, run
        if directory.resumed:
            self._progress.note(f"resuming the compression that {directory.folder} holds")
        elif self._resume:
            self._progress.note(f"nothing to resume: no state of a compression lies beside {self._out}")
        return run

    def _tell(self) -> None:
        if self._directory is not None and self._directory.journal.entries:
            self._progress.note(
                f"what is finished is kept in {self._directory.folder}: the same with {called('resume', 'True')} "
                "continues from there, and removes it at its end"
            )


def published(spec: CompressionSpec, source: Callable[[], ModelSource], out: Path) -> bool:
    """Whether an output is that of a run which was killed before it removed its state; that is removed then.

    Args:
        spec: of the compression that would resume.
        source: finds the dense model.
        out: the output.

    Raises:
        ParedError: the state is damaged.
    """
    folder = run_folder(out, KIND)
    settings = settings_of(folder) if (out / MANIFEST).is_file() else None
    if settings is None:
        return False
    asked = _asked(spec)
    if {name: settings.get(name) for name in asked} != asked or settings.get("model") != source().digest():
        return False
    with RunDirectory.open(out, KIND, settings) as directory:
        if CompressionRun(directory).get(PUBLISHED) != sha256_of(out / MANIFEST):
            return False
        directory.finish()
    return True


def _asked(spec: CompressionSpec) -> dict[str, Any]:
    return {**spec.recipe.model_dump(mode="json", exclude=LEFT_OUT), "resolved": as_json(spec.describe())}


def measured_once(
    measure: PerplexityOn, model: PreTrainedModel, state: CompressionRun | None, store: Blocks | None = None
) -> float:
    """Return the perplexity of the dense model, measured unless an earlier process did."""
    if state is None:
        return measure.before(model, store)
    name = f"perplexity before on {measure.windows.digest}, bos {measure.bos}"
    if state.get(name) is None:
        state.put(name, measure.before(model, store))
    return float(state.get(name))


def fingerprint_of(
    spec: CompressionSpec, source: ModelSource, calibration: Windows | None, streamed: bool
) -> dict[str, Any]:
    """Return everything that the compressed model depends on.

    Args:
        spec: what is done.
        source: the dense model.
        calibration: the tokens it is done on.
        streamed: whether the model is read block by block, as what is kept of a block is another then.

    Raises:
        ParedError: a file of the model cannot be read.
    """
    return {
        **_asked(spec),
        "model": source.digest(),
        "device": device_of(spec.recipe.device).type,  # auto may be another on another machine
        "calibration tokens": None if calibration is None else calibration.digest,
        STREAMED: streamed,
        "versions": versions(),
    }
