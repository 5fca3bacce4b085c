"""The training methods there are."""

from collections.abc import Mapping
from typing import Any

from pared.lazy import deferred
from pared.names import require_known
from pared.training.method import TuningMethod
from pared.training.options import Basel, Distill, Full, Lora

METHODS: dict[str, TuningMethod] = {
    method.name: method
    for method in (
        TuningMethod(
            name="lora",
            paper="Hu et al., ICLR 2022, arXiv 2106.09685; SVD-LLM's order: arXiv 2403.07378",
            summary="adapters on the factors, or on layers named by pattern, merged: rank and format stay",
            stages=deferred("pared.training.lora:stages"),
            learning_rate=1e-4,
            epochs=2.0,
            config=Lora,
        ),
        TuningMethod(
            name="full",
            paper="ours; of all parameters Basis Sharing's: J. Wang et al., ICLR 2025, arXiv 2410.03765",
            summary="all factors on the model's own loss",
            stages=deferred("pared.training.full:stages"),
            learning_rate=2e-6,
            config=Full,
        ),
        TuningMethod(
            name="distill",
            paper="Hinton et al., 2015, arXiv 1503.02531",
            summary="factors and norms towards the predictions of the dense parent, on any text",
            stages=deferred("pared.training.distill:stages"),
            learning_rate=3e-5,
            config=Distill,
        ),
        TuningMethod(
            name="basel",
            paper="Li et al., TMLR 2025, arXiv 2405.15877; importance bsi: arXiv 2605.01627",
            summary="a dense model made smaller for a task: importance of bases relearned, the useless ones dropped",
            stages=deferred("pared.training.basel.method:stages"),
            learning_rate=2e-5,
            config=Basel,
            needs_whole=deferred("pared.training.basel.method:needs_whole"),
            compresses=True,
        ),
    )
}


def method_of(name: str) -> TuningMethod:
    """Return a training method by name.

    Raises:
        ParedError: there is none of that name.
    """
    require_known("training method", name, METHODS)
    return METHODS[name]


def settled(method: TuningMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a method, the default of each that is not given.

    Raises:
        ParedError: an unknown option, or a value that cannot be.
    """
    return method.configured(given).model_dump()
