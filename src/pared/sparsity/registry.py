"""The pruning methods, one declaration each: which statistics it needs and how one weight is pruned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pared.lazy import deferred
from pared.sparsity.pattern import Pattern

if TYPE_CHECKING:  # what a method is called and which options it has is read without it
    import torch

    from pared.sparsity.masks import Pruned

Statistics = Mapping[str, "torch.Tensor"]
Rule = Callable[["torch.Tensor", Pattern, Statistics, Mapping[str, Any]], "Pruned"]


@dataclass(frozen=True)
class PruningMethod:
    """A pruning method.

    Attributes:
        name: what a recipe calls it.
        paper: where it comes from.
        summary: what it does, in a line.
        needs: names of the statistics it reads, from the shapes ``(out, in)`` of the sites that read one tensor.
        rule: from a weight ``(out, in)``, a pattern, those statistics by name and the options to a pruned weight.
        options: names and default values; a recipe may set others of the same type.
        allocation: how zeros are spread over the model unless a recipe says otherwise.
        blind: what decides where nothing but zeros reach a weight, so that its statistics say nothing.
    """

    name: str
    paper: str
    summary: str
    needs: Callable[[Sequence[tuple[int, int]]], frozenset[str]]
    rule: Rule
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    allocation: str = "uniform"
    blind: str = ""

    def fallback(self, statistics: Statistics) -> str:
        """Return the rule that decides where all statistics are zero, for the record; empty where they decide."""
        said = not statistics or any(bool(value.any()) for value in statistics.values())
        return "" if said else f"nothing but zeros reach it on the text: {self.blind}"

    def check(self, options: Mapping[str, object]) -> None:
        """Refuse values that an option does not have.

        Raises:
            ValueError: names the option.
        """
        for name, least in (("block", 1), ("damping", 0)):
            value = options.get(name, least)
            if not isinstance(value, (int, float)) or value < least:
                raise ValueError(f"option {name}: expected {least} or more, found {value!r}")

    def prune(
        self,
        W_ON: "torch.Tensor",
        pattern: Pattern,
        statistics: Statistics,
        options: Mapping[str, object] | None = None,
    ) -> "Pruned":
        """Prune one weight ``(out, in)``, with the default of every option that is not given.

        Raises:
            ValueError: the weight, a statistic, the pattern or an option is none the method can work with.
        """
        if unknown := set(options or {}) - set(self.options):
            raise ValueError(f"method {self.name} has no option {', '.join(sorted(unknown))}; it has "
                             f"{', '.join(self.options) or 'none'}")  # fmt: skip
        return self.rule(W_ON, pattern, statistics, {**self.options, **(options or {})})

    @property
    def calibrated(self) -> bool:
        """Whether it needs data at all."""
        return bool(self.needs([(1, 1)]))


def nothing(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need no data."""
    return frozenset()


def energy(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the sum of squares of every input feature."""
    return frozenset({"energy"})


def gram(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the Gram of every input."""
    return frozenset({"gram"})


METHODS = {
    method.name: method
    for method in (
        PruningMethod(
            name="magnitude",
            paper="Han et al., NeurIPS 2015 (arXiv 1506.02626)",
            summary="the smallest weights of every matrix go; needs no data",
            needs=nothing,
            rule=deferred("pared.sparsity.rules:by_magnitude"),
        ),
        PruningMethod(
            name="wanda",
            paper="Sun et al., ICLR 2024 (arXiv 2306.11695)",
            summary="within every output, the smallest weights times the norm of their input go; none is changed",
            needs=energy,
            rule=deferred("pared.sparsity.rules:by_wanda"),
            options={"variant": False},
            blind="pruned by magnitude, within every output",
        ),
        PruningMethod(
            name="sparsegpt",
            paper="Frantar and Alistarh, ICML 2023 (arXiv 2301.00774)",
            summary="what hurts the layer's output least goes, input by input, and later weights make up for it",
            needs=gram,
            rule=deferred("pared.sparsity.rules:by_sparsegpt"),
            options={"block": 128, "damping": 0.01},
            blind="pruned by magnitude, within every block of inputs",
        ),
    )
}
