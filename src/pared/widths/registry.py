"""The methods that take channels and heads out, or experts, and lower no rank, one declaration each."""

from typing import Annotated, Literal

from pydantic import Field

from pared.lazy import deferred
from pared.lowrank.registry import GradientOptions, LowRankMethod, Shapes, mean_gram
from pared.schema.options import Options


class Flap(Options):
    """Options of ``flap``."""


class WandaSp(Options):
    """Options of ``wanda-sp``."""


class LlmPruner(GradientOptions):
    """Options of ``llm-pruner``."""

    loss: Annotated[
        Literal["sampled", "labels"],
        Field(description="whose loss: of the text's labels, or of labels sampled from the model's own predictions"),
    ] = "labels"


class ModeGpt(Options):
    """Options of ``modegpt``."""

    ridge: Annotated[
        float, Field(gt=0, description="λ of the ridge leverage scores, above 0, relative to the mean energy of inputs")
    ] = 1.0


class Reap(Options):
    """Options of ``reap``."""


def fluctuation(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the mean and the variance of every input feature."""
    return frozenset({"mean", "variance"})


def energy(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the energy of every input feature."""
    return frozenset({"energy"})


def of_experts(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require what experts make of their tokens, which is no statistic of a layer."""
    return frozenset({"experts"})


def weight_gradient(_: Options) -> frozenset[str]:
    """Require the gradient of the loss through every weight."""
    return frozenset({"weight_gradient"})


METHODS: dict[str, LowRankMethod] = {
    method.name: method
    for method in (
        LowRankMethod(
            name="flap",
            paper="An et al., AAAI 2024 (arXiv 2312.11983)",
            summary="channels and heads whose inputs fluctuate least go, and their mean goes on as a bias",
            config=Flap,
            solve=None,
            requires=fluctuation,
            allocation="global",
            widths=deferred("pared.widths.rules:fluctuating"),
            shifts=True,
            heads=True,
            structures=lambda _: "widths",
        ),
        LowRankMethod(
            name="llm-pruner",
            paper="Ma et al., NeurIPS 2023 (arXiv 2305.11627), without its training",
            summary="channels and heads whose weights change the loss least to first order go",
            config=LlmPruner,
            solve=None,
            gradients=weight_gradient,
            widths=deferred("pared.widths.rules:first_order"),
            heads=True,
            structures=lambda _: "widths",
        ),
        LowRankMethod(
            name="modegpt",
            paper="Lin et al., ICLR 2025 (arXiv 2408.09632), its MLPs alone",
            summary="channels of the least ridge leverage scores go, with least squares for those that stay",
            config=ModeGpt,
            solve=None,
            requires=mean_gram,
            input_gram="mean_gram",
            widths=deferred("pared.widths.rules:nystroem"),
            heads=False,
            structures=lambda _: "widths",
        ),
        LowRankMethod(
            name="reap",
            paper="Lasby et al., 2025 (arXiv 2510.13999)",
            summary="whole experts of a mixture go, of the least mean norm of their outputs times the router's weight",
            config=Reap,
            solve=None,
            requires=of_experts,
            experts=deferred("pared.widths.rules:reap"),
            structures=lambda _: "experts",
        ),
        LowRankMethod(
            name="wanda-sp",
            paper="An et al., AAAI 2024 (arXiv 2312.11983), after Wanda (arXiv 2306.11695)",
            summary="channels and heads of the smallest weights times inputs go, each block behind those pruned",
            config=WandaSp,
            solve=None,
            requires=energy,
            statistics=lambda _: "sequential",
            widths=deferred("pared.widths.rules:sized"),
            heads=True,
            structures=lambda _: "widths",
        ),
    )
}
