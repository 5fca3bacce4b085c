"""What a training method is, as data: stages one after the other, and what each of them trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pared.schema.options import Configured, Kind, Options
from pared.schema.training import TrainingConfig

if TYPE_CHECKING:  # what a method is called and which options it has is read without them
    import torch
    from transformers import PreTrainedModel, TrainerCallback

    from pared.schema.manifest import Manifest
    from pared.training.dataset import Examples

Batch = Mapping[str, "torch.Tensor"]
Loss = Callable[[Any, Batch], "torch.Tensor"]


def own_loss(model: Any, batch: Batch) -> "torch.Tensor":
    """Return the model's own loss on labels: the mean over predicted tokens, or over examples."""
    loss: torch.Tensor = model(**batch).loss
    return loss


@dataclass
class Prepared:
    """A model made ready for one stage.

    Attributes:
        model: what is trained, with gradients wanted for exactly what trains.
        loss: of a batch, the mean over its tokens or examples.
        finish: makes of what was trained a model that can be saved; in float32 where it was trained.
        callbacks: in addition to those every training has.
        buffers: names of buffers that change while training and so belong to its state.
        rate: times the learning rate that was asked for.
        faster: ends of parameters' names, and what their learning rate is times that of the others.
        reached: figures for the record, there once ``finish`` has been called.
        notes: what a user should know of the result, there then too.
    """

    model: Any
    finish: "Callable[[], PreTrainedModel]"
    loss: Loss = own_loss
    callbacks: "list[TrainerCallback]" = field(default_factory=list)
    buffers: tuple[str, ...] = ()
    rate: float = 1.0
    faster: Mapping[str, float] = field(default_factory=dict)
    reached: dict[str, float | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What a stage is prepared from.

    Attributes:
        model: in evaluation mode, nothing of it wants gradients; changed in place.
        options: of the method.
        tuning: what was asked for.
        manifest: of the folder that is trained; none for a dense model.
        steps: optimiser steps of this stage.
        examples: rows to train on.
        device: where this process trains.
        precision: what products are made in.
    """

    model: "PreTrainedModel"
    options: Mapping[str, Any]
    tuning: TrainingConfig
    manifest: "Manifest | None"
    steps: int
    examples: "Examples"
    device: "torch.device"
    precision: "torch.dtype"


@dataclass(frozen=True)
class Stage:
    """One training from beginning to end, after which the model is an ordinary folder again.

    Attributes:
        name: for people and files.
        prepare: makes the model ready.
        share: epochs for every one asked for; of tokens, its part of all stages' shares.
        warmup: the share of the steps in which the learning rate rises.
        schedule: how it falls then: constant, linear, cosine, or cosine to a tenth.
        patient: whether the best state may be kept and training stop early; not where the model is made smaller
            meanwhile, as the best is then the largest.
    """

    name: str
    prepare: Callable[[Context], Prepared]
    share: float = 1.0
    warmup: float = 0.0
    schedule: str = "constant"
    patient: bool = True


@dataclass(frozen=True)
class TuningMethod(Configured[Options]):
    """How a model is trained.

    Attributes:
        name: what users call it.
        paper: where it is from.
        summary: one line for people.
        stages: from the options to what is trained one after the other.
        learning_rate: at the peak, if nothing else is asked for.
        epochs: if nothing else is asked for.
        config: its options; the type belongs to this method alone.
        needs_whole: why it cannot train weights in shards with these options, nothing if it can.
        compresses: whether it makes the model smaller itself and so takes dense ones; the others take folders.
    """

    name: str
    paper: str
    summary: str
    stages: Callable[[Mapping[str, Any]], tuple[Stage, ...]]
    learning_rate: float
    config: type[Options]
    epochs: float = 1.0
    needs_whole: Callable[[Mapping[str, Any]], str] = lambda options: ""  # noqa: ARG005
    compresses: bool = False
    kind: ClassVar[Kind] = "training method"
