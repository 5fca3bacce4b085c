"""What the user asked for of a training: one model, one method, data, how long, a folder out."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pared.schema.base import Name, Whole
from pared.schema.command_line import OWN, Option
from pared.schema.options import Kind
from pared.schema.presets import FromPreset
from pared.schema.recipe import Device, DType, Evaluation, OptionValues, TextName

Positive = Annotated[Whole, Field(ge=1, strict=True)]


class TrainingConfig(FromPreset):
    """A whole training: folder or model in, folder out."""

    COMMAND: ClassVar[Literal["compress", "tune"]] = "tune"
    NOUN: ClassVar[str] = "tuning"
    TYPED: ClassVar[Mapping[str, tuple[Kind, str]]] = {"method": ("training method", "options")}
    version: Literal[1] = 1
    """Version of this file's layout."""
    model: Annotated[Name | None, Option(argument=True)] = None
    """A folder that pared made; for methods that compress themselves (basel) any named dense model."""
    method: Annotated[str, Option()] = "distill"
    """A name that `pared methods` lists under training."""
    data: Annotated[tuple[TextName, ...], Option()] = ("embedded",)
    """What to train on, by name: a text, instruct:NAME, or for encoders glue:NAME:train or ner:NAME:train; several are
    mixed."""
    template: Annotated[str, Option()] = "alpaca"
    """Template of the prompts of instructions: alpaca, plain."""
    length: Annotated[Whole, Field(ge=2, strict=True), Option()] = 512
    """Tokens in a window of a text, the most tokens of an example."""
    windows: Annotated[Positive | None, Option(default="all")] = None
    """The most windows or examples of each."""
    validation: Annotated[Whole, Field(ge=0, strict=True), Option()] = 8
    """Windows or examples at the end of each that are never trained on, to measure the loss on."""
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, Option(default="lora 2, others 1")] = None
    """How often the data is gone through."""
    tokens: Annotated[Positive | None, Option()] = None
    """Tokens to train on, in place of epochs; rounded up to a whole step."""
    batch: Annotated[Positive, Option()] = 8
    """Windows a batch and process."""
    accumulation: Annotated[Positive, Option()] = 1
    """Batches whose gradients make one step."""
    learning_rate: Annotated[Annotated[float, Field(gt=0)] | None, Option(default=OWN)] = None
    """Learning rate of AdamW at its peak."""
    warmup: Annotated[Annotated[float, Field(ge=0)] | None, Option(default=OWN)] = None
    """How long the learning rate rises at first: below 1 a share of the steps, from 1 on steps."""
    schedule: Annotated[Literal["auto", "constant", "linear", "cosine"], Option(default=OWN)] = "auto"
    """How the learning rate falls."""
    clip: Annotated[float, Field(gt=0), Option()] = 1.0
    """Largest norm of a step's gradient; a larger one is scaled down to it."""
    weight_decay: Annotated[float, Field(ge=0), Option()] = 0.0
    """Weight decay of AdamW."""
    evaluate_every: Annotated[Positive | None, Option(default="at the ends")] = None
    """Steps between two measurements of the validation loss, which is measured before the first step and at the end."""
    patience: Annotated[Positive | None, Option()] = None
    """Stop after so many measurements without a smaller loss, and keep the best."""
    checkpoint_every: Annotated[Positive, Option()] = 100
    """Steps between two saved states, from which training resumes after a crash."""
    gradient_checkpointing: Annotated[bool, Option()] = False
    """Compute activations again in the backward pass rather than hold them: less memory for a third more time."""
    precision: Annotated[DType, Option()] = "auto"
    """What is multiplied in; auto is the dtype of the model, or for float32 models bfloat16 where that is measured to
    be faster. What is trained is held in float32."""
    report_to: Annotated[tuple[str, ...], Option()] = ()
    """A tracker, as Accelerate names it: tensorboard, wandb."""
    options: Annotated[OptionValues, Option("--option")] = Field(default={})
    """Option of the method, NAME=VALUE, by the names that `pared methods` lists; a list of names is one text with
    commas."""
    evaluation: Evaluation | None = Evaluation()
    """What perplexity is measured on before and after; null measures nothing."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32, strict=True), Option()] = 0
    """Seed of the order of the data, of dropout and of what a method draws."""
    device: Annotated[Device, Option()] = "auto"
    """Where it runs, as torch names it; auto takes the GPU (CUDA) where there is one."""
    out: Annotated[Annotated[Name, Field(min_length=1)] | None, Option(path=True)] = None
    """The folder to make."""

    @field_validator("warmup", mode="after")
    @classmethod
    def _whole_steps(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError(f"warmup is a share of the steps below 1, and a whole number of steps from 1; got {value}")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _lists_are_texts(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: ",".join(map(str, one)) if isinstance(one, (list, tuple)) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _sensible(self) -> "TrainingConfig":
        if not self.data:
            raise ValueError("data names nothing to train on")
        if self.tokens is not None and self.epochs is not None:
            raise ValueError(f"tokens {self.tokens} and epochs {self.epochs:g} are two lengths; give one")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts measurements; say how often to measure with evaluate_every")
        if self.evaluate_every is not None and not self.validation:
            raise ValueError("evaluate_every measures on the validation part, and validation is 0")
        return self
