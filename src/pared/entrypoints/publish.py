"""Publishing: what was made becomes a folder that is saved, reloaded, compared, measured, recorded and described.

Every folder that pared writes is written here, so that all of them hold to the same promises: the folder appears whole
or not at all, was loaded from disk and gave the outputs of the model that was in memory, and lists every file with its
SHA-256.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint.save import save
from pared.checkpoint.seal import seal, seal_plain
from pared.checkpoint.self_check import reloaded, written
from pared.checkpoint.verify import take_fingerprint
from pared.io.output_dir import staged
from pared.models.source import ModelSource
from pared.progress import Stopwatch
from pared.report.card import model_card
from pared.schema.manifest import Fingerprint, Manifest


class Saver(Protocol):
    """Writes a model to a folder; afterwards it holds none of its weights, as there may be room for one model only."""

    def __call__(self, folder: Path) -> Fingerprint:
        """Write weights, configuration, loader and tokenizer.

        Returns:
            What the model answered before it was written.
        """


class Reloader(Protocol):
    """Opens a folder that was just written."""

    def __call__(
        self, folder: Path, fingerprint: Fingerprint, source: str
    ) -> AbstractContextManager[tuple[PreTrainedModel, float]]:
        """Load what was written and compare it.

        Args:
            folder: that was written.
            fingerprint: what it must answer.
            source: name of what it was made of, for messages.

        Returns:
            A context in which the model may be called, and its largest difference from the fingerprint, relative to
            the largest output.

        Raises:
            ParedError: it cannot be loaded, or differs by more than kernels can make.
        """


class ResidentSaver:
    """Saves a model that is in memory as a whole, and releases it.

    Args:
        model: compressed and marked, or dense; the caller must hold no other reference to free its memory.
        tokenizer: of the model, none for a model without.
        source: what it was made from, whose files for images and dialogues are copied; none for a model that was not
            loaded by name.
        fingerprint: what it must answer when it is reloaded; by default what it answers now.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        source: ModelSource | None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self._model: PreTrainedModel | None = model
        self._tokenizer, self._source, self._fingerprint = tokenizer, source, fingerprint

    def __call__(self, folder: Path) -> Fingerprint:
        """Write the model; see :class:`Saver`."""
        model, self._model = self._model, None
        assert model is not None
        fingerprint = self._fingerprint or take_fingerprint(model)
        save(model, self._tokenizer, folder, self._source)
        return fingerprint


@contextmanager
def reload_resident(folder: Path, fingerprint: Fingerprint, source: str) -> Iterator[tuple[PreTrainedModel, float]]:
    """Load a folder as a whole; see :class:`Reloader`."""
    yield reloaded(folder, fingerprint, source)


@dataclass(frozen=True)
class Reread:
    """What is known of a folder once it was written and reloaded.

    Attributes:
        model: that was reloaded; may be called until the manifest is made.
        bytes_on_disk: of the weights.
        fingerprint: what the model answered before it was written.
        self_check: largest difference of the reloaded model from that, relative to the largest output.
        perplexity: of the reloaded model; none if it was not measured.
    """

    model: PreTrainedModel
    bytes_on_disk: int
    fingerprint: Fingerprint
    self_check: float
    perplexity: float | None

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields of a manifest that are measured whenever a folder is written."""
        return {"bytes_on_disk": self.bytes_on_disk, "fingerprint": self.fingerprint, "self_check": self.self_check}


class Written(NamedTuple):
    """A plain folder that was published.

    Attributes:
        bytes_on_disk: of the weights.
        self_check: as in :class:`Reread`.
    """

    bytes_on_disk: int
    self_check: float


@dataclass
class Publication:
    """Where a folder is to appear, and what it is made of.

    Attributes:
        out: the folder to make.
        source: name of what it is made of, for messages.
        overwrite: whether a folder there that pared wrote may be replaced.
        needed: bytes that the disk must have free.
        inputs: local files and folders that were read; the manifest records their last names and SHA-256.
        beside: others that were read and are not recorded; the output must not touch them either.
        watch: seconds by stage.
        sealed: is given the folder when it is complete, before it takes its place.
    """

    out: Path
    source: str
    overwrite: bool = False
    needed: int = 0
    inputs: Sequence[Path] = ()
    beside: Sequence[Path] = ()
    watch: Stopwatch = field(default_factory=Stopwatch)
    sealed: Callable[[Path], None] | None = None

    def publish(
        self,
        write: Saver,
        manifest: Callable[[Reread], Manifest],
        measure: Callable[[PreTrainedModel], float] | None = None,
        reload: Reloader = reload_resident,
    ) -> Manifest:
        """Save, reload, compare, measure, record and describe; the folder takes its place only after all of that.

        Args:
            write: writes the model to a folder beside the place.
            manifest: makes the record of what was reloaded.
            measure: returns the perplexity of the reloaded model; none measures nothing.
            reload: opens what was written.

        Returns:
            The manifest as it was written.

        Raises:
            ParedError: the place is taken, the disk is full, or what was written is not what was in memory; nothing
                was written or replaced.
        """
        with self._reread(write, measure, reload) as (staging, reread):
            made = seal(staging, manifest(reread), self.out.name, self.inputs, model_card)
            if self.sealed is not None:
                self.sealed(staging)
            return made

    def publish_plain(self, write: Saver, reload: Reloader = reload_resident) -> Written:
        """Save, reload and compare what needs nothing of pared: a folder that lists its files, without a manifest.

        Args:
            write: as for :meth:`publish`.
            reload: as for :meth:`publish`.

        Raises:
            ParedError: as :meth:`publish`.
        """
        with self._reread(write, None, reload) as (staging, reread):
            seal_plain(staging, self.inputs)
        return Written(reread.bytes_on_disk, reread.self_check)

    @contextmanager
    def _reread(
        self, write: Saver, measure: Callable[[PreTrainedModel], float] | None, reload: Reloader
    ) -> Iterator[tuple[Path, Reread]]:
        """Write beside the place and give what was reloaded; on leaving, the folder takes its place."""
        with (
            staged(self.out, self.overwrite, self.needed, [*self.inputs, *self.beside]) as staging,
            ExitStack() as opened,
        ):
            with self.watch("save"):
                fingerprint = write(staging)
                bytes_on_disk = written(staging, self.source)
            gc.collect()
            with self.watch("verify"):
                model, difference = opened.enter_context(reload(staging, fingerprint, self.source))
            perplexity = None if measure is None else measure(model)
            yield staging, Reread(model, bytes_on_disk, fingerprint, difference, perplexity)
