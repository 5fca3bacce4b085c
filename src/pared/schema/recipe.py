"""What the user asked for: one versioned file that can express all of a compression."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from pared.memory import Stream
from pared.schema.base import Config, Name, Size, Whole
from pared.schema.bits import Form
from pared.schema.command_line import OWN, Option
from pared.schema.options import Kind
from pared.schema.presets import OF_USE, FromPreset


def _torch_name(value: object) -> object:
    """Return the name of a dtype or device of torch, which this page need not import."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _text_name(value: object) -> object:
    return f"file:{os.fspath(value)}" if isinstance(value, os.PathLike) else value


DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_torch_name)]
Device = Annotated[str, BeforeValidator(_torch_name)]
TextName = Annotated[str, BeforeValidator(_text_name)]  # a path is the text file there


# What docs/results/low_rank.md and docs/results/sparsity.md recommend; the second where the budget is one of zeros.
DEFAULT_METHOD, DEFAULT_PRUNER = "loss-optimal", "sparsegpt"
PLAIN_METHOD = "svd"  # which reads nothing and, where all is kept, does nothing
BUDGETS = ("keep", "keep_bytes", "target_bytes", "rank_fraction", "sparsity", "pattern")  # of which a recipe has one

OptionValues = dict[str, bool | int | float | str]
Bos = Literal["none", "text", "window"]
Sampling = Literal["consecutive", "shuffled", "random-offset"]
Use = Literal["code", "math", "chat", "general"]


class Calibration(Config):
    """The text the statistics are collected on."""

    text: Annotated[TextName, Option("--data")] = "embedded"
    """Calibration text by name: embedded, wikitext2:train, c4:train, gsm8k:train, alpaca, stdlib:train, file:PATH, or
    NAME:SPLIT:FIELD of the datasets library."""
    samples: Annotated[Annotated[Whole, Field(ge=1, strict=True)] | None, Option()] = 256
    """Calibration windows, or labelled examples; in a file null means all there are."""
    length: Annotated[Whole, Field(ge=2, strict=True), Option()] = 2048
    """Tokens in a calibration window."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63, strict=True), Option()] = 0
    """Seed of the random offsets."""
    sampling: Annotated[Sampling, Option()] = "consecutive"
    """Which windows: consecutive ones from the start, shuffled ones of all adjacent ones, or windows that
    begin at a random-offset each."""
    dtype: Annotated[DType, Option("--calibration-dtype")] = "auto"
    """What the blocks compute in while calibrating; auto measures whether bfloat16 is faster on this machine, unless
    the environment variable PARED_COMPUTE_DTYPE decides. Statistics are accumulated in float32 or better in any
    case."""
    batch: Annotated[Whole, Field(ge=1, strict=True)] = 4
    """Windows in one forward pass."""


class Evaluation(Config):
    """The text perplexity is measured on, before and after."""

    text: Annotated[TextName, Option("--eval")] = "auto"
    """Text to measure perplexity on, before and after; auto takes the held-out part of the calibration text, or for a
    training what the folder was measured on when it was compressed; none measures nothing."""
    length: Annotated[Whole, Field(ge=2, strict=True), Option("--eval-length")] = 1024
    """Tokens in an evaluation window."""
    windows: Annotated[Annotated[Whole, Field(ge=1, strict=True)] | None, Option("--eval-windows")] = 20
    """Evaluation windows, from the start of the text; in a file null means all."""
    bos: Bos = "none"
    """Where a beginning-of-sequence token is put: nowhere (none), before the text, before every window."""


class Refinement(Config):
    """How every block is trained once its weights are replaced, to output what the dense block does."""

    epochs: Annotated[Whole, Field(ge=1, le=1000, strict=True), Option("--refine-epochs")] = 2
    """How often every block is trained on the calibration windows; two epochs in a row that bring nothing on those held
    out, every eighth batch, end it. If none brings anything, it starts again at 1/8, and then at 1/64, of the rate."""
    lr: Annotated[float, Field(gt=0, le=1), Option("--refine-lr")] = 3e-4
    """Highest learning rate of Adam; it rises over a tenth of the steps, and falls to 0."""
    batch: Annotated[Whole, Field(ge=1, strict=True), Option("--refine-batch")] = 1
    """Windows in a step; fewer where there are not two such batches, of which one is held out."""
    loss: Annotated[Literal["next-norm", "plain"], Option("--refine-loss")] = "next-norm"
    """Which error of a block's output is made small: every feature weighted as the norm behind the block weights it
    (next-norm) or all alike (plain), relative to the size of the token's hidden state."""


class Recipe(FromPreset):
    """A whole compression: model in, method, budget, data, folder out."""

    COMMAND: ClassVar[Literal["compress", "tune"]] = "compress"
    NOUN: ClassVar[str] = "recipe"
    TYPED: ClassVar[Mapping[str, tuple[Kind, str]]] = {
        "method": ("method", "options"),
        "allocation": ("allocation", "allocation_options"),
    }
    version: Literal[1] = 1
    """Version of this file's layout."""
    model: Annotated[Name | None, Option(argument=True)] = None
    """embedded:smollm2-135m, a Hub id, a local folder, or a .gguf file."""
    method: Annotated[str, Option(default=f"{DEFAULT_METHOD}; {DEFAULT_PRUNER} with --sparsity or --pattern")] = (
        DEFAULT_METHOD
    )
    """A name that `pared methods` lists."""
    keep: Annotated[float, Field(gt=0, le=1), Option()] = 0.8
    """Fraction of the parameters of the target modules that stays: 0.8 removes 20%."""
    keep_bytes: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Option()] = None
    """Fraction of the bytes of the target modules that stays, a budget in place of keep: every weight is stored as it
    is, as int8 or as int4, whole or with a rank, whichever loses least."""
    target_bytes: Annotated[Size | None, Option()] = None
    """The same as a size of all weights together, such as 120MB."""
    rank_fraction: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Option()] = None
    """A budget of ranks in place of keep: this fraction of every weight's full rank (FWSVD: 0.33)."""
    sparsity: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Option()] = None
    """Fraction of zeros, a budget in place of keep for methods that prune: 0.5 makes half of the weights zero."""
    pattern: Annotated[str | None, Option()] = None
    """The same as N:M: of every M consecutive inputs of an output N stay."""
    skip: Annotated[tuple[str, ...], Option()] = ()
    """Shell-style pattern of module names that are left dense and do not count in the budget."""
    blocks: Annotated[str | None, Option()] = None
    """Name of the list of blocks to compress, where it is not the language model's: a vision tower's."""
    allocation: Annotated[str, Option(default=OWN)] = "auto"
    """How the budget is spread over the target modules, by a name that `pared methods` lists."""
    allocation_options: Annotated[OptionValues, Option("--allocation-option")] = Field(default={})
    """Option of the allocation, NAME=VALUE, by the names that `pared methods` lists."""
    structures: Annotated[Literal["auto", "ranks", "widths", "mixed", "experts"], Option(default=OWN)] = "auto"
    """What is made smaller: the ranks of weights; the widths of MLPs, whose channels are taken out, so that layers stay
    plain ones; mixed, each MLP in the way that loses less; or mixtures of experts, which lose whole experts, as many in
    every layer."""
    heads: Annotated[
        Literal["auto", "on", "off"],
        Option(
            default="with widths alone the method's own; of loss-optimal, on where the allocation looks at the text"
        ),
    ] = "auto"
    """With widths or mixed: whether key/value heads can be taken out too, each with the query heads that read it."""
    multiple_of: Annotated[Annotated[Whole, Field(ge=1, strict=True)] | None, Option(default="64")] = None
    """What widths of MLPs are multiples of, as processors and kernels are fastest with round numbers."""
    storage: Annotated[Literal["auto", "factors", "pivoted"], Option(default=OWN)] = "auto"
    """How a low-rank weight is stored: as two factors, or pivoted, which needs rank² fewer parameters without loss."""
    elastic: Annotated[bool, Option()] = False
    """Write one folder for every size from keep downwards, which `pared slice` cuts out of it in seconds without data:
    ranks stored as factors, of statistics that are collected once."""
    quantize: Annotated[Form | None, Option()] = None
    """Store the target modules, compressed or not, in few bits: int8 with a scale for every output, or int4 with one
    for every 64 inputs. Without a method or a budget nothing else is done."""
    rounding: Annotated[Literal["feedback", "nearest"], Option()] = "feedback"
    """How weights are rounded to few bits: one input after the other, later ones making up for the errors of those
    before as the text's inputs say (feedback), or each to the nearest, which reads no text."""
    statistics: Annotated[Literal["auto", "once", "sequential"], Option(default=OWN)] = "auto"
    """Collected on the dense model (once), or collected again when the ranks are known, block after block behind those
    already compressed (sequential)."""
    refit: Annotated[Literal["auto", "off", "update", "sequential", "sequential-dense-block"], Option(default=OWN)] = (
        "auto"
    )
    """Fit every up factor to the inputs that the compressed model has: update (all at once), sequential (block after
    block, each behind those already fitted), sequential-dense-block (the same, to what the layers of the dense block
    read there, as SVD-LLM's released code does), off."""
    dense_path: Annotated[float | Literal["auto"], Option(default=OWN)] = "auto"
    """Share of the dense model's own outputs in the targets of a refit and of sequential statistics, 0 to 1, or auto;
    the rest is what the dense weights make of the compressed model's inputs."""
    refine: Annotated[Refinement | None, Option("--refine")] = None
    """Train every compressed block, each behind those already trained, to output what the dense block does."""
    options: Annotated[OptionValues, Option("--option")] = Field(default={})
    """Option of the method, NAME=VALUE, by the names that `pared methods` lists."""
    calibrate_on: Annotated[Use | None, Option()] = None
    """Calibrate on text like that of a use, by shuffled windows of it, where no text is named."""
    calibration: Calibration = Calibration()
    """What the statistics are collected on."""
    evaluation: Evaluation | None = Evaluation()
    """What perplexity is measured on; null measures nothing."""
    dtype: Annotated[DType, Option()] = "auto"
    """What the model is loaded and saved in; auto keeps what the checkpoint has, and reads a quantised .gguf
    file as bfloat16."""
    device: Annotated[Device, Option()] = "auto"
    """Where the blocks run, as torch names it; auto takes the GPU (CUDA) where there is one."""
    stream: Annotated[Stream, Option()] = "auto"
    """Read and write the model block by block; auto does where memory does not hold it as a whole."""
    activation_memory: Annotated[Size | None, Option()] = None
    """Memory for what blocks read of the calibration text, such as 2GiB; the rest lies in files beside the output. By
    default all of it, or where the model is read block by block a quarter of the memory that is left."""
    out: Annotated[Annotated[Name, Field(min_length=1)] | None, Option(path=True)] = None
    """The folder to make."""

    @classmethod
    def implied(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the method where a budget of zeros, or few bits, are all that is given."""
        budgets = any(fields.get(name) is not None for name in BUDGETS)
        if fields.get("quantize") is not None and "method" not in fields and not budgets:
            return {"method": PLAIN_METHOD, "keep": 1.0}
        zeros = any(fields.get(name) is not None for name in ("sparsity", "pattern"))
        return {"method": DEFAULT_PRUNER} if zeros and "method" not in fields else {}

    @field_validator("pattern")
    @classmethod
    def _n_of_m(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"[0-9]+:[0-9]+", value) is None:
            raise ValueError(f"pattern is N:M, such as 2:4: of every M consecutive inputs N stay; got {value!r}")
        return value

    @field_validator("keep", mode="before")
    @classmethod
    def _no_percentages(cls, value: object) -> object:
        number = value
        if isinstance(value, str):  # from a file; "80%" is none
            with suppress(ValueError):
                number = float(value)
        if isinstance(number, (bool, str)) or (isinstance(number, (int, float)) and not 0 < number <= 1):
            percent = isinstance(number, (int, float)) and 1 < number <= 100
            meant = f"; did you mean {float(number) / 100:g}?" if percent else ""
            raise ValueError(f"keep is the fraction that stays, in (0, 1], so that 0.8 removes 20%; got {value}{meant}")
        return value

    @field_validator("refine", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """Take what YAML makes of ``on`` and ``off``."""
        return ("on" if value else "off") if isinstance(value, bool) else value

    @field_validator("dense_path", mode="before")
    @classmethod
    def _a_share(cls, value: object) -> object:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(value, str) and value != "auto":
            with suppress(ValueError):
                value, number = float(value), True  # from the command line
        if value != "auto" and not (number and 0 <= value <= 1):  # type: ignore[operator]
            raise ValueError(f"dense_path is a share, 0 to 1, or auto; got {value}")
        return value

    @model_validator(mode="after")
    def _one_budget(self, info: ValidationInfo) -> "Recipe":
        recorded = bool((info.context or {}).get("recorded"))  # holds every field, the defaults too
        given = {
            name: value
            for name in BUDGETS
            if (value := getattr(self, name)) is not None
            and (value != Recipe.model_fields[name].default if recorded else name in self.model_fields_set)
        }
        if len(given) > 1:
            (one, first), (two, second) = list(given.items())[:2]
            raise ValueError(f"{one} {first} and {two} {second} are two budgets; give one")
        if self.rank_fraction is not None and self.allocation != "auto":
            raise ValueError(f"rank_fraction fixes every rank, so that allocation {self.allocation!r} has nothing to "
                             "decide; leave one of them out")  # fmt: skip
        return self

    @model_serializer(mode="wrap")
    def _told(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the default of ``keep`` where there is another budget, and those of a text where a use names one.

        What is dumped can be read again, and is the same then.
        """
        fields: dict[str, Any] = handler(self)
        if any(getattr(self, name) is not None for name in BUDGETS if name != "keep"):
            fields.pop("keep", None)
        for name in OF_USE if self.calibrate_on is not None and "calibration" in fields else ():
            if name not in self.calibration.model_fields_set:
                fields["calibration"].pop(name, None)
        return fields

    @property
    def of_bytes(self) -> bool:
        """Whether the budget is one of bytes."""
        return self.keep_bytes is not None or self.target_bytes is not None

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.keep_bytes is not None:
            return f"keep bytes {self.keep_bytes:g}"
        if self.target_bytes is not None:
            return f"target bytes {self.target_bytes}"
        if self.rank_fraction is not None:
            return f"rank fraction {self.rank_fraction:g}"
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:g}"
        return f"keep {self.keep:g}" if self.pattern is None else f"pattern {self.pattern}"
