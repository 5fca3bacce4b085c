"""``pared.json``: everything that is needed to understand and repeat a compression."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from typing_extensions import NotRequired, TypedDict

from pared.errors import ParedError
from pared.io.files import path_of, write_whole
from pared.io.guarded import brief, read_json
from pared.io.record import MANIFEST, checksum
from pared.schema.base import Strict
from pared.schema.elastic import Elastic
from pared.schema.plan import Plan
from pared.schema.presets import RECORDED, PresetRecord
from pared.schema.recipe import Recipe
from pared.schema.training import TrainingConfig

FORMAT_VERSION = 1  # that of the loader, which is copied into every folder and so has to name it itself


# Limits of a fingerprint; it has 16 tokens, and 64 outputs of 64 layers.
MOST_SAMPLES, LARGEST_TOKEN = 4096, 2**31


class Fingerprint(Strict):
    """What the model answered in memory before it was saved.

    Attributes:
        tokens: input ids of one sequence.
        outputs: a sample of the outputs at the last token.
        positions: which outputs were sampled.
        layers: of compressed layers that the sequence does not reach (experts, a vision tower), by name, a sample of
            what each makes of a fixed input.
    """

    tokens: list[Annotated[int, Field(strict=True, ge=0, le=LARGEST_TOKEN)]] = Field(max_length=MOST_SAMPLES)
    positions: list[Annotated[int, Field(strict=True, ge=0, le=LARGEST_TOKEN)]] = Field(max_length=MOST_SAMPLES)
    outputs: list[FiniteFloat] = Field(max_length=MOST_SAMPLES)
    layers: dict[str, Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_SAMPLES)]] = Field(
        default={}, max_length=MOST_SAMPLES
    )

    @model_validator(mode="after")
    def _fits(self) -> "Fingerprint":
        if not self.tokens or not self.outputs or len(self.positions) != len(self.outputs):
            raise ValueError("expected tokens, and one output for every position")
        return self


class TooFew(TypedDict):
    """A calibration text of fewer distinct tokens than its Grams take.

    Keys:
        tokens: distinct ones of the text.
        wanted: by the widest Gram.
        features: of that Gram.
        layers: that are solved by Grams for which the tokens are too few.
    """

    tokens: int
    wanted: int
    features: int
    layers: int


class Origin(TypedDict):
    """What was compressed: the last part of its name, where it came from, its class, and what its publisher says of it.

    Keys:
        base_model: its id on the Hub.
        license: as the Hub spells it; ``license_name`` and ``license_link`` are of one that the Hub does not list.
    """

    name: str
    origin: str
    architecture: str
    base_model: NotRequired[str]
    license: NotRequired[str]
    license_name: NotRequired[str]
    license_link: NotRequired[str]


class WindowsRead(TypedDict):
    """What was calibrated or trained on, see :meth:`pared.data.windows.Windows.describe`; it may say more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    text: str
    origin: str
    windows: int
    length: int
    digest: str
    stand_in: bool


class Measured(WindowsRead):
    """What perplexity was measured on, and which share of it was calibrated or trained on."""

    bos: str
    learned_from: NotRequired[float]


class StageRecord(TypedDict):
    """How one stage of a training went, see :class:`pared.training.trainer.StageResult`."""

    name: str
    steps: int
    tokens: int
    trained_parameters: int
    loss: tuple[float, float]
    validation: list[tuple[int, float]]
    reached: NotRequired[dict[str, float | int]]
    notes: NotRequired[list[str]]


class Refined(Strict):
    """What training a block towards the dense one's outputs came to.

    Attributes:
        name: of the block.
        before: the mean squared error of its output on the windows held out, weighted as the recipe's loss says,
            relative to the mean square of a token's target.
        after: the same with what was kept; never more.
        epochs: how many it was trained for; 0 where it is as it was.
    """

    name: str
    before: FiniteFloat
    after: FiniteFloat
    epochs: int


class Training(Strict):
    """The record of one training of a compressed model.

    Attributes:
        tuning: what was asked for.
        preset: the protocol it began with, its source, and by field where it was left; none without one.
        settled: the method's options, and what ``auto`` stood for.
        parent: the name of what was trained, and the digest of all of its files.
        data: what was trained on, with the digest of the tokens.
        stages: name, steps, tokens, trained parameters, loss and validation losses of each.
        too_few: what is lacking of the calibration text, where it has fewer tokens than its Grams take.
        evaluation: what perplexity was measured on; none if it was not.
        perplexity_before: of the parent.
        perplexity_after: of the trained model, reloaded from disk.
        seconds: by stage, of the last try if there were several.
        peak_memory_bytes: as in the manifest.
        versions: of the software.
        machine: where it ran.
    """

    tuning: TrainingConfig
    preset: PresetRecord | None = None
    settled: dict[str, Any]
    parent: dict[str, str]
    data: list[WindowsRead]
    stages: list[StageRecord]
    evaluation: Measured | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]
    machine: dict[str, str]


class Manifest(Strict):
    """The record of one compression; what the report and the model card are made of.

    Attributes:
        format_version: of the folder.
        model: what was compressed, and where it came from.
        recipe: what was asked for.
        preset: the protocol it began with, its source, and by field where it was left; none without one.
        settled: what ``auto`` stood for in it.
        plan: what was decided.
        damping: sites whose Gram was rank-deficient, with the relative damping used.
        shrinkage: how far the statistics of every site were drawn towards their mean diagonal, by site and statistic.
        fallbacks: sites whose weight or statistics say nothing, with the rule that decided.
        sharing: for every group that was compared, what one basis loses and what bases of their own lose.
        refined: what training every block came to, in order; empty where none was trained.
        calibration: what was calibrated on, with the digest of the tokens.
        evaluation: what perplexity was measured on; none if it was not.
        perplexity_before: of the dense model.
        perplexity_after: of the compressed model, reloaded from disk.
        seconds: by stage.
        peak_memory_bytes: the process's highest resident memory (CUDA: highest allocated memory).
        memory_bound_bytes: of a streamed compression, what it is to keep to: the process before weights were read, what
            is outside of the blocks, three blocks, the statistics of one, activation memory and 1 GiB; 0 for none.
        resumed: how many processes had begun it and were ended before the one that wrote the folder; seconds are summed
            over all of them, until the last line of each, and the peak of memory is the highest of them.
        bytes_before: of the dense weights in the saved dtype.
        bytes_on_disk: of the saved weights.
        fingerprint: for the self-check.
        self_check: largest difference of the reloaded model from the fingerprint, relative to its largest output.
        converted: in which form `pared convert` stored the weights, if it did; everything measured but
            ``bytes_on_disk`` and ``self_check`` is from before.
        elastic: how smaller sizes are cut out of the folder, if it is one of every size.
        training: how the model was trained since, one entry a training; perplexity is that of the last.
        inputs: SHA-256 of the local files and folders it was made of, by the last names that the recipe has for them.
        files: SHA-256 of every other file of the folder, by name; none in folders of before they were listed.
        checksum: SHA-256 of all else in here.
        versions: of the software.
        machine: where it ran.
    """

    format_version: int
    model: Origin
    recipe: Recipe
    preset: PresetRecord | None = None
    settled: dict[str, Any] = Field(default={})
    plan: Plan
    damping: dict[str, float] = Field(default={})
    shrinkage: dict[str, dict[str, float]] = Field(default={})
    fallbacks: dict[str, str] = Field(default={})
    sharing: list[dict[str, Any]] = Field(default=[])
    refined: tuple[Refined, ...] = ()
    calibration: WindowsRead | None = None
    too_few: TooFew | None = None
    evaluation: Measured | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    seconds: dict[str, float] = Field(default={})
    peak_memory_bytes: int = 0
    memory_bound_bytes: int = 0
    resumed: int = 0
    bytes_before: int = 0
    bytes_on_disk: int = 0
    fingerprint: Fingerprint
    self_check: float
    converted: str | None = None
    elastic: Elastic | None = None
    training: tuple[Training, ...] = ()
    inputs: dict[str, str] = Field(default={})
    files: dict[str, str] = Field(default={})
    checksum: str = ""
    versions: dict[str, str]
    machine: dict[str, str]

    @model_validator(mode="after")
    def _describes_a_model(self) -> "Manifest":
        if not self.plan.sites or min(self.plan.before.covered_parameters, self.plan.model_parameters) < 1:
            raise ValueError("plan: expected at least one site, and parameters")
        return self

    def write(self, folder: Path) -> "Manifest":
        """Write ``pared.json``, and return this manifest with its checksum."""
        stated = self.model_copy(update={"checksum": checksum(json.loads(self.model_dump_json()))})
        write_whole(folder / MANIFEST, stated.model_dump_json(indent=2) + "\n")
        return stated

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Read ``pared.json``.

        Raises:
            ParedError: there is none, or it is not one.
        """
        folder = path_of(folder)
        path = folder / MANIFEST
        if not os.path.isdir(folder):
            what = "a file, expected a folder that pared made" if os.path.isfile(folder) else "no such folder"
            raise ParedError(f"{folder}: {what}")
        if not os.path.lexists(path):
            raise ParedError(
                f"{folder} has no {MANIFEST}: `pared compress`, `pared tune` and pared.run write one; a folder saved "
                "by save_pretrained or exported to plain weights has none"
            )
        fields = read_json(path, "manifest")
        _require_version(path, fields)
        try:
            return cls.__pydantic_validator__.validate_python(fields, context=RECORDED)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ParedError(f"{path}: {where}: {first['msg']}; written by another version of pared?") from None


def _require_version(path: Path, fields: object) -> None:
    """Refuse what is no manifest, or of a later version, before it is held against this one's fields."""
    found = fields.get("format_version") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or type(found) is not int or found < 1:
        stated = f"format_version is {brief(found)}" if isinstance(fields, dict) else f"got {brief(fields)}"
        raise ParedError(f"{path}: {stated}, expected a manifest with a whole number from 1; it is damaged")
    if found > FORMAT_VERSION:
        raise ParedError(f"{path}: format version {found}, this pared reads {FORMAT_VERSION}: update pared")
