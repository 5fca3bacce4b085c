"""The pruning methods, one declaration each: its options, the statistics it needs and how weights are pruned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import TypeVar

from pared.lazy import deferred
from pared.operations import Operation
from pared.schema.options import Configured, Kind, Options
from pared.sparsity import operations
from pared.sparsity.pattern import Pattern

if TYPE_CHECKING:  # what a method is called and which options it has is read without it
    import torch

    from pared.sparsity.masks import Pruned
    from pared.sparsity.solution import PruningSolution

Statistics = Mapping[str, "torch.Tensor"]
Shapes = Sequence[tuple[int, int]]  # (out, in) of the sites that read one tensor
C = TypeVar("C", bound=Options, default=Any)


def nothing(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require no data."""
    return frozenset()


def energy(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the sum of squares of every input feature."""
    return frozenset({"energy"})


def gram(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the Gram of every input."""
    return frozenset({"gram"})


@dataclass(frozen=True)
class PruningMethod(Configured[C]):
    """A pruning method. Satisfies :class:`pared.methods.Method`.

    Attributes:
        name: what a recipe calls it.
        paper: where it comes from.
        summary: what it does, in a line.
        config: its options; the type belongs to this method alone.
        solve: from one weight ``(out, in)``, its statistics by name and the options to what answers every pattern.
        requires: names of the statistics it reads, from the shapes ``(out, in)`` of the sites that read one tensor and
            the options.
        allocation: how zeros are spread over the model unless a recipe says otherwise.
        blind: what decides where nothing but zeros reach a weight, so that its statistics say nothing.
        updates: whether weights that are kept change, so that its zeros cannot be had from the dense model's scores.
        operations: what pruning the weights that read one tensor takes, from their shapes ``(out, in)`` and the
            options, by which ``pared plan --cost`` predicts its time; none where that is not known.
    """

    name: str
    paper: str
    summary: str
    config: type[C]
    solve: "Callable[[Sequence[torch.Tensor], Sequence[Statistics], C], PruningSolution]"
    requires: Callable[[Shapes, C], frozenset[str]] = nothing
    allocation: str = "uniform"
    blind: str = ""
    updates: bool = False
    kind: ClassVar[Kind] = "method"
    operations: Callable[[Shapes, C], Sequence[Operation]] | None = None
    family: ClassVar[Literal["sparse"]] = "sparse"

    def gradients(self, _: Options) -> frozenset[str]:
        """Return the names of the statistics of a backward pass: no pruning method reads any."""
        return frozenset()

    def fallback(self, statistics: Statistics) -> str:
        """Return the rule that decides where all statistics are zero, for the record; empty where they decide."""
        said = not statistics or any(bool(value.any()) for value in statistics.values())
        return "" if said else f"nothing but zeros reach it on the text: {self.blind}"

    def prune(
        self,
        W_ON: "torch.Tensor",
        pattern: Pattern,
        statistics: Statistics,
        options: Mapping[str, object] | Options | None = None,
    ) -> "Pruned":
        """Prune one weight ``(out, in)``, with the default of every option that is not given.

        Raises:
            ParedError: an option the method does not have, or a value that it does not take.
            ValueError: the weight, a statistic or the pattern is none the method can work with.
        """
        return self.pruned(W_ON, pattern, statistics, self.configured(options))

    def pruned(self, W_ON: "torch.Tensor", pattern: Pattern, statistics: Statistics, config: C) -> "Pruned":
        """Prune one weight ``(out, in)``.

        Raises:
            ValueError: the weight, a statistic or the pattern is none the method can work with, or the method gives
                nothing that can be pruned.
        """
        solution = self.solve([W_ON], [statistics], config)
        if not hasattr(solution, "realize"):
            raise ValueError(f"method {self.name} gives a {type(solution).__name__}, expected what realizes a pattern")
        return solution.realize(pattern)

    @property
    def calibrated(self) -> bool:
        """Whether it needs data at all, by default."""
        return bool(self.requires([(1, 1)], self.config()))


class Magnitude(Options):
    """Options of ``magnitude``."""


class Wanda(Options):
    """Options of ``wanda``."""

    variant: Annotated[
        bool, Field(description="whether every output gives up the same share of its scores, not as many weights")
    ] = False


class SparseGpt(Options):
    """Options of ``sparsegpt``."""

    block: Annotated[int, Field(ge=1, description="1 or more inputs, which are compared and updated together")] = 128
    damping: Annotated[
        float, Field(ge=0, description="0 or more, added to the Gram's diagonal, relative to its mean")
    ] = 0.01


METHODS: dict[str, PruningMethod] = {
    method.name: method
    for method in (
        PruningMethod(
            name="magnitude",
            paper="Han et al., NeurIPS 2015 (arXiv 1506.02626)",
            summary="the smallest weights of every matrix go; needs no data",
            config=Magnitude,
            solve=deferred("pared.sparsity.rules:by_magnitude"),
            operations=operations.by_matrix,
        ),
        PruningMethod(
            name="wanda",
            paper="Sun et al., ICLR 2024 (arXiv 2306.11695)",
            summary="within every output, the smallest weights times the norm of their input go; none is changed",
            config=Wanda,
            solve=deferred("pared.sparsity.rules:by_wanda"),
            operations=operations.by_row,
            requires=energy,
            blind="pruned by magnitude, within every output",
        ),
        PruningMethod(
            name="sparsegpt",
            paper="Frantar and Alistarh, ICML 2023 (arXiv 2301.00774)",
            summary="what hurts the layer's output least goes, input by input, and later weights compensate",
            config=SparseGpt,
            solve=deferred("pared.sparsity.rules:by_sparsegpt"),
            operations=operations.by_sparsegpt,
            requires=gram,
            blind="pruned by magnitude, within every block of inputs",
            updates=True,
        ),
    )
}
