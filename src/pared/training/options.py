"""The options of training methods, a type each; read without torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from pared.schema.options import Options

ALL, PEFT = "compressed", "peft"  # in place of patterns: every layer that pared made; what PEFT adapts by itself
FACTORS = ("up", "down", "both")


class Lora(Options):
    """Options of ``lora``."""

    rank: Annotated[int, Field(ge=1, description="1 or more")] = 8
    alpha: Annotated[int, Field(gt=0, description="more than 0")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="a share, 0 to below 1")] = 0.0
    targets: Annotated[str, Field(description=f"{ALL}, {PEFT} or patterns of layers with commas")] = ALL
    factor: Annotated[
        Literal["up", "down", "both"], Field(description="which factor of low-rank layers is adapted")
    ] = "up"
    order: Annotated[
        Literal["together", "sequential"], Field(description="all at once, or first every up, then every down")
    ] = "together"

    @field_validator("targets")
    @classmethod
    def _patterns(cls, targets: str) -> str:
        if targets in FACTORS:
            raise ValueError(f"it names layers by pattern, such as *.q_proj,*.v_proj; which factor is adapted is "
                             f"option factor: factor={targets}")  # fmt: skip
        if not patterns_of(targets):
            raise ValueError(f"expected {ALL}, {PEFT} or patterns of layers with commas, got ''")
        return targets


def patterns_of(targets: str) -> list[str]:
    """Return the patterns of a text with commas."""
    return [pattern for part in targets.split(",") if (pattern := part.strip())]


class Full(Options):
    """Options of ``full``."""

    train: Annotated[Literal["factors", "factors+norms", "all"], Field(description="which parameters are trained")] = (
        "factors"
    )


class Distill(Options):
    """Options of ``distill``."""

    teacher: Annotated[str, Field(description="whose predictions are the targets: parent, or a model by name")] = (
        "parent"
    )
    temperature: Annotated[float, Field(gt=0, description="more than 0")] = 1.0
    text: Annotated[float, Field(ge=0, le=1, description="a share, 0 to 1")] = 0.5
    hidden: Annotated[float, Field(ge=0, description="0 or more")] = 0.0
    adapters: Annotated[int, Field(ge=0, description="a rank, or 0 for none")] = 0


class Basel(Options):
    """Options of ``basel``."""

    keep_ratio: Annotated[float, Field(gt=0, le=1, description="a fraction, above 0 and at most 1")] = 0.5
    keep: Annotated[
        float, Field(ge=0, le=1, description="a fraction, above 0 and at most 1, or 0 for keep_ratio in its place")
    ] = 0.0
    prunes: Annotated[int, Field(ge=1, description="1 or more times that bases are dropped")] = 100
    keeping_epochs: Annotated[float, Field(ge=0, description="0 or more, for every epoch asked for")] = 1.0
    pruning_epochs: Annotated[float, Field(gt=0, description="more than 0, for every epoch asked for")] = 2.0
    post_epochs: Annotated[float, Field(ge=0, description="0 or more, for every epoch asked for")] = 3.0
    new: Annotated[int, Field(ge=0, description="0 or more new bases a layer")] = 32
    relearn: Annotated[bool, Field(description="whether coefficients are relearned")] = True
    coefficient_rate: Annotated[float, Field(gt=0, description="more than 0, times the learning rate")] = 1.0
    importance: Annotated[
        Literal["magnitude", "fisher", "bsi"], Field(description="what a basis is worth when some are dropped")
    ] = "magnitude"
    l1: Annotated[float, Field(ge=0, description="0 for none, or the weight of the penalty")] = 0.0
    probes: Annotated[int, Field(ge=1, description="1 or more random signs a prune, for bsi")] = 1
    basis: Annotated[
        Literal["weight", "outputs"], Field(description="what bases are: singular vectors, or directions of outputs")
    ] = "weight"
    bases: Annotated[Literal["bfloat16", "float32"], Field(description="what bases are held in")] = "bfloat16"
    skip: Annotated[str, Field(description="patterns of layers to leave alone, with commas")] = ""

    @model_validator(mode="after")
    def _penalty(self) -> Self:
        if self.l1 and (self.importance != "magnitude" or not self.relearn):
            raise ValueError("option l1 is a penalty on coefficients that are learned, in place of dropping bases by "
                             "importance: it goes with importance=magnitude and relearn=true alone")  # fmt: skip
        return self
