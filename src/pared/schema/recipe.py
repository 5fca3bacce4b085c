"""What the user asked for: one versioned file that can express all of a compression."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
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

from pared.schema.base import Name, Strict, Whole, read_fields, validated
from pared.schema.presets import FromPreset


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
BUDGETS = ("keep", "rank_fraction", "sparsity", "pattern")  # of which a recipe has one

Bos = Literal["none", "text", "window"]
Sampling = Literal["consecutive", "shuffled", "random-offset"]


class Calibration(Strict):
    """The text the statistics are collected on.

    Attributes:
        text: a text by name (``embedded``, ``wikitext2:train``, ``c4:train``, ``alpaca``, ``file:PATH``,
            ``NAME:SPLIT:FIELD`` of the datasets library).
        samples: number of token windows, or of labelled examples; none means all there are.
        length: tokens in a window.
        seed: seed of the random offsets.
        sampling: ``consecutive`` windows from the start, ``shuffled`` ones of all of those that lie side by side, or
            windows at ``random-offset`` tokens.
        dtype: what the blocks compute in; ``auto`` measures whether bfloat16 is faster on this machine,
            unless the environment variable PARED_COMPUTE_DTYPE settles it.
            Statistics are accumulated in float32 or better whatever this says.
        batch: windows in one forward pass.
    """

    text: TextName = "embedded"
    samples: Annotated[Whole, Field(ge=1, strict=True)] | None = 256
    length: Annotated[Whole, Field(ge=2, strict=True)] = 2048
    seed: Annotated[Whole, Field(ge=0, lt=2**63, strict=True)] = 0
    sampling: Sampling = "consecutive"
    dtype: DType = "auto"
    batch: Annotated[Whole, Field(ge=1, strict=True)] = 4


class Evaluation(Strict):
    """The text perplexity is measured on, before and after.

    Attributes:
        text: a text by name; ``auto`` takes the held-out part of a calibration text that has one.
        length: tokens in a window.
        windows: how many windows from the start; none means all.
        bos: where a beginning-of-sequence token is put: nowhere, before the text, before every window.
    """

    text: TextName = "auto"
    length: Annotated[Whole, Field(ge=2, strict=True)] = 1024
    windows: Annotated[Whole, Field(ge=1, strict=True)] | None = 20
    bos: Bos = "none"


class Recipe(FromPreset):
    """A whole compression: model in, method, budget, data, folder out.

    Attributes:
        preset: a protocol by name, which ``pared presets`` lists; what is given beside it wins.
        version: version of this file's layout.
        model: ``embedded:smollm2-135m``, a Hub id, a local folder, or a ``.gguf`` file. Unused by
            :func:`pared.compress`, which is given the model itself.
        method: a name that ``pared methods`` lists; unless one is named ``loss-optimal``, and with ``sparsity`` or
            ``pattern`` ``sparsegpt``.
        keep: fraction of the parameters of the covered sites that stays; 0.8 removes 20%.
        rank_fraction: a budget of ranks in place of ``keep``: every weight gets this fraction of its full rank (FWSVD).
        sparsity: a budget of zeros in place of ``keep``, for methods that prune: 0.5 makes half of the weights zero.
        pattern: ``N:M`` in place of it: N of every M consecutive inputs of an output stay.
        skip: shell-style patterns of site names that are left alone and not counted in the budget.
        blocks: name of the list of blocks that is compressed, where it is not the language model's: a vision tower's.
        allocation: how the budget is spread over the sites; ``auto`` is what the method's paper does.
        allocation_options: of the allocation, by the names that ``pared methods`` lists.
        storage: ``factors`` stores a low-rank weight as two factors, ``pivoted`` without loss in rank² fewer numbers;
            ``auto`` is what the method says.
        statistics: ``once`` collects them on the dense model; ``sequential`` collects them once more, block after block
            behind the blocks that are compressed already, when the ranks are known; ``auto`` is what the method says.
        refit: a stage after the method that fits every ``up`` to the inputs the compressed model has: ``update`` all at
            once, ``sequential`` block after block, each behind those already fitted, ``sequential-dense-block`` the
            same to what the layers of the dense block read there (SVD-LLM's released code); ``auto`` is what the method
            says, ``off`` is neither.
        dense_path: the share of the dense model's own outputs in the targets of a refit and of sequential statistics;
            the rest is what the dense weights make of the compressed model's inputs. ``auto`` is what the method says.
        options: of the method, by the names that ``pared methods`` lists.
        calibration: what the statistics are collected on.
        evaluation: what perplexity is measured on; ``null`` measures nothing.
        dtype: what the model is loaded and saved in; ``auto`` keeps what the checkpoint has.
        device: where the blocks run, as torch names it.
        out: the folder to write.
    """

    COMMAND: ClassVar[Literal["compress", "tune"]] = "compress"
    version: Literal[1] = 1
    model: Name | None = None
    method: str = DEFAULT_METHOD
    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    rank_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    pattern: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    skip: tuple[str, ...] = ()
    blocks: str | None = None
    allocation: str = "auto"
    allocation_options: dict[str, bool | int | float | str] = Field(default={})
    storage: Literal["auto", "factors", "pivoted"] = "auto"
    statistics: Literal["auto", "once", "sequential"] = "auto"
    refit: Literal["auto", "off", "update", "sequential", "sequential-dense-block"] = "auto"
    dense_path: float | Literal["auto"] = "auto"
    options: dict[str, bool | int | float | str] = Field(default={})
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    dtype: DType = "auto"
    device: Device = "cpu"
    out: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _pruner(cls, fields: Any) -> Any:
        """Name the method where a budget of zeros is all that is given; a preset names its own."""
        if not isinstance(fields, Mapping) or any(fields.get(name) is not None for name in ("method", "preset")):
            return fields
        zeros = any(fields.get(name) is not None for name in ("sparsity", "pattern"))
        return {**fields, "method": DEFAULT_PRUNER} if zeros and "method" not in fields else fields

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
            raise ValueError(
                f"keep is the fraction that stays, in (0, 1], so that 0.8 removes 20%; found {value}{meant}"
            )
        return value

    @field_validator("dense_path", mode="before")
    @classmethod
    def _a_share(cls, value: object) -> object:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(value, str) and value != "auto":
            with suppress(ValueError):
                value, number = float(value), True  # from the command line
        if value != "auto" and not (number and 0 <= value <= 1):  # type: ignore[operator]
            raise ValueError(f"dense_path is a share, 0 to 1, or auto; found {value}")
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
        """Leave out the default of ``keep`` where there is another budget, as what is told can be read again."""
        fields: dict[str, Any] = handler(self)
        if any(getattr(self, name) is not None for name in BUDGETS if name != "keep"):
            fields.pop("keep", None)
        return fields

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.rank_fraction is not None:
            return f"rank fraction {self.rank_fraction:g}"
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:g}"
        return f"keep {self.keep:g}" if self.pattern is None else f"pattern {self.pattern}"

    @classmethod
    def of(cls, fields: Any, origin: str = "recipe") -> "Recipe":
        """Build a recipe from plain data.

        Raises:
            ParedError: an unknown key (quoted, with the nearest valid one) or a value out of range.
        """
        return validated(cls, fields, origin)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a YAML (or JSON) file.

        Raises:
            ParedError: the file is missing, not YAML, or not a recipe.
        """
        return cls.of(read_fields(path, "recipe"), origin=f"recipe {path}")
