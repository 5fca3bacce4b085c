"""The statistics there are, by name."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from pared.calibration.statistics.base import Of, Statistic, StatisticView
from pared.calibration.statistics.features import Energy, Magnitude, Mean, Variance
from pared.calibration.statistics.gradients import Fisher, OutputGradient, WeightGradient
from pared.calibration.statistics.gram import CROSS, Cross, Gram, MeanGram
from pared.errors import ParedError
from pared.names import did_you_mean


@dataclass(frozen=True)
class StatisticKind:
    """A statistic by name.

    Attributes:
        accumulator: made from the number of features and the device.
        of: what it watches; says whose features those are.
        normalised: how its value depends on the tokens: a ``sum`` grows with them; a ``mean`` is over those that
            reached the site, and is weighed by how many those are; ``none`` is taken as it is.
        data_fraction: share of the windows that it needs, at least, to be known well.
        together: so many neighbouring windows are one observation, which no process sees a part of.
        whole: whether it has a number for every weight, in place of one or more for every feature.
        gram: whether it is a Gram of features, of full rank from as many tokens on as those are.
    """

    accumulator: Callable[[int, torch.device], Statistic]
    of: Of
    normalised: Literal["sum", "mean", "none"] = "none"
    data_fraction: float = 1.0
    together: int = 1
    whole: bool = False
    gram: bool = False

    @property
    def backward(self) -> bool:
        """Whether it needs a backward pass."""
        return self.of in ("output_grad", "weight_grad")

    def features(self, out_features: int, in_features: int) -> int:
        """Return how many features the statistic of a weight ``(out, in)`` has."""
        if self.whole:
            return out_features * in_features
        return out_features if self.of in ("output", "output_grad") else in_features


def _output_gradient(form: Literal["scalar", "diagonal", "full"], data_fraction: float) -> StatisticKind:
    return StatisticKind(partial(OutputGradient, form=form), "output_grad", data_fraction=data_fraction)


# A Gram needs every token there is, and Fisher information is a paper's; mean squares are known from a quarter.
STATISTICS = {
    "gram": StatisticKind(Gram, "input", "sum", gram=True),
    "mean_gram": StatisticKind(MeanGram, "input", "mean", gram=True),
    "magnitude": StatisticKind(Magnitude, "input"),
    "energy": StatisticKind(Energy, "input", "sum"),
    "mean": StatisticKind(Mean, "input"),
    "variance": StatisticKind(Variance, "input", "mean"),
    "output_gram": StatisticKind(partial(Gram, of="output"), "output", "sum", gram=True),
    "fisher": StatisticKind(Fisher, "weight_grad", "sum"),  # `fisher:N` squares N examples together
    "weight_gradient": StatisticKind(WeightGradient, "weight_grad", "sum", whole=True),
    "output_gradient_scalar": _output_gradient("scalar", 0.25),
    "output_gradient_diagonal": _output_gradient("diagonal", 0.25),
    "output_gradient_full": _output_gradient("full", 1.0),
    CROSS: StatisticKind(Cross, "input_pair"),
}


def statistic_kind(name: str) -> StatisticKind:
    """Return a statistic by name; ``fisher:N`` squares the gradients of N examples together.

    Raises:
        ParedError: there is none of this name; says which exist.
    """
    kind, colon, number = name.partition(":")
    if not colon and kind in STATISTICS:
        return STATISTICS[kind]
    if kind == "fisher" and number.isascii() and number.isdigit() and int(number) > 0:
        fisher = partial(Fisher, batch=int(number))
        return replace(STATISTICS[kind], accumulator=fisher, together=int(number))
    raise ParedError(f"unknown statistic {name!r}; {did_you_mean(name, _collected())}")


def require_statistics(names: Collection[str]) -> None:
    """Refuse names of statistics that do not exist, and those that only a pass over two models has.

    Raises:
        ParedError: there is one, or there is no name at all; says which exist.
    """
    if isinstance(names, str) or not names:
        raise ParedError(f"statistics: expected a set of names, got {names!r}; there are {', '.join(_collected())}")
    for name in sorted(names):
        if statistic_kind(name).of == "input_pair":
            raise ParedError(f"unknown statistic {name!r}; {did_you_mean(name, _collected())}")


def per_token(name: str, collected: StatisticView, tokens: int = 0) -> torch.Tensor:
    """Return a statistic per token of the text, so that what is made of it does not depend on how much text there was.

    A sum is divided by the tokens. A site that only a part of them reaches (an expert) counts for that part, and one
    whose block runs several times for that many: its mean Gram is weighed by it, as what its outputs cost the loss is.

    Args:
        name: of the statistic.
        collected: what was seen of it.
        tokens: of the text, padding aside; those that reached the site where they are not known.
    """
    tokens = max(tokens or collected.tokens, 1)
    normalised = statistic_kind(name).normalised
    if normalised == "sum":
        # A Gram makes its square anew every time; another kind may give what it goes on with.
        return collected.value.div_(tokens) if isinstance(collected, Gram) else collected.value / tokens
    if normalised == "mean" and collected.tokens != tokens:
        return collected.value * (collected.tokens / tokens)
    return collected.value


def backward_data_fraction(names: Collection[str]) -> float:
    """Return the share of the windows that a backward pass for these statistics goes over."""
    return max((statistic_kind(name).data_fraction for name in names), default=1.0)


def _collected() -> list[str]:
    """Return the names of what can be asked for."""
    return sorted(name for name, kind in STATISTICS.items() if kind.of != "input_pair")
