"""What the user asked for of a training: one model, one method, data, how long, a folder out."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pared.schema.base import Name, Whole, read_fields, validated
from pared.schema.presets import FromPreset
from pared.schema.recipe import Device, DType, Evaluation, TextName

Positive = Annotated[Whole, Field(ge=1, strict=True)]


class Tuning(FromPreset):
    """A whole training: folder or model in, folder out.

    Attributes:
        preset: a protocol by name, which ``pared presets`` lists; what is given beside it wins.
        version: version of this file's layout.
        model: what is trained; a folder that pared made, or for methods that compress themselves any named model.
        method: a name that ``pared methods`` lists under training.
        data: what is trained on, by name; several are mixed.
        template: of the prompts of instructions.
        length: tokens in a window of a text, the most tokens of an example.
        windows: the most windows or examples of each; none means all.
        validation: windows or examples at the end of each that are never trained on, to measure the loss on.
        epochs: how often the data is gone through; none is the method's own.
        tokens: how many tokens are trained on, in place of ``epochs``; rounded up to a whole step.
        batch: windows a step and process.
        accumulation: batches whose gradients make one step.
        learning_rate: of AdamW at its peak; none is the method's own.
        warmup: how long it rises at first: below 1 a share of the steps, from 1 on steps; none is the method's own.
        schedule: how it falls; ``auto`` is the method's own.
        clip: gradients are scaled to at most this norm.
        weight_decay: of AdamW.
        evaluate_every: steps between two measurements of the loss on the validation part; none measures at the end.
        patience: measurements without a smaller loss after which training stops; the best is kept. None trains on.
        checkpoint_every: steps after which the state is saved, to resume from after a crash.
        gradient_checkpointing: compute activations again in the backward pass rather than hold them.
        precision: what is multiplied in; ``auto`` is the dtype of the model, or for float32 models bfloat16 where that
            is measured to be faster. What is trained is held in float32.
        report_to: trackers by the names Accelerate has for them.
        options: of the method, by the names that ``pared methods`` lists; a list of names is one text with commas.
        evaluation: what perplexity is measured on before and after; ``auto`` is what the folder was measured on when it
            was compressed, ``null`` measures nothing.
        seed: of order, dropout and what a method draws.
        device: where it runs.
        out: the folder to write.
    """

    COMMAND: ClassVar[Literal["compress", "tune"]] = "tune"
    version: Literal[1] = 1
    model: Name | None = None
    method: str = "distill"
    data: tuple[TextName, ...] = ("embedded",)
    template: str = "alpaca"
    length: Annotated[Whole, Field(ge=2, strict=True)] = 512
    windows: Positive | None = None
    validation: Annotated[Whole, Field(ge=0, strict=True)] = 8
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Positive | None = None
    batch: Positive = 8
    accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    warmup: Annotated[float, Field(ge=0)] | None = None
    schedule: Literal["auto", "constant", "linear", "cosine"] = "auto"
    clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    evaluate_every: Positive | None = None
    patience: Positive | None = None
    checkpoint_every: Positive = 100
    gradient_checkpointing: bool = False
    precision: DType = "auto"
    report_to: tuple[str, ...] = ()
    options: dict[str, bool | int | float | str] = Field(default={})
    evaluation: Evaluation | None = Evaluation()
    seed: Annotated[Whole, Field(ge=0, lt=2**32, strict=True)] = 0
    device: Device = "cpu"
    out: Name | None = None

    @field_validator("warmup", mode="after")
    @classmethod
    def _whole_steps(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError(
                f"warmup is a share of the steps below 1, and a whole number of steps from 1; found {value}"
            )
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _lists_are_texts(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: ",".join(map(str, one)) if isinstance(one, (list, tuple)) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _sensible(self) -> "Tuning":
        if not self.data:
            raise ValueError("data names nothing to train on")
        if self.tokens is not None and self.epochs is not None:
            raise ValueError(f"tokens {self.tokens} and epochs {self.epochs:g} are two lengths; give one")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts measurements; say how often to measure with evaluate_every")
        if self.evaluate_every is not None and not self.validation:
            raise ValueError("evaluate_every measures on the validation part, and validation is 0")
        return self

    @classmethod
    def of(cls, fields: Any, origin: str = "tuning") -> "Tuning":
        """Build a tuning from plain data.

        Raises:
            ParedError: an unknown key (quoted, with the nearest valid one) or a value out of range.
        """
        return validated(cls, fields, origin)

    @classmethod
    def load(cls, path: str | Path) -> "Tuning":
        """Read a tuning from a YAML (or JSON) file.

        Raises:
            ParedError: the file is missing, not YAML, or not a tuning.
        """
        return cls.of(read_fields(path, "tuning"), origin=f"tuning {path}")
