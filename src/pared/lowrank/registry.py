"""The low-rank methods, one declaration each: its options, the statistics it needs and how weights are decomposed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import TypeVar

from pared.errors import ParedError
from pared.lazy import deferred
from pared.lowrank import operations
from pared.operations import Operation
from pared.schema.options import Configured, Kind, Options

if TYPE_CHECKING:  # what a method is called and which options it has is read without it
    import torch

    from pared.lowrank.decomposition import Decomposition
    from pared.lowrank.shrinkage import Shrinkage

Statistics = Mapping[str, "torch.Tensor"]
Shapes = Sequence[tuple[int, int]]  # (out, in) of the sites that read one tensor


class GradientOptions(Options):
    """Options of a method that reads gradients of the loss."""

    loss: Annotated[
        Literal["sampled", "labels"],
        Field(description="whose loss: of labels sampled from the model's own predictions, or of the text's"),
    ] = "sampled"


class DrawnOptions(GradientOptions):
    """Options of a method that weighs by second moments of gradients, of labels that are drawn."""

    labels_per_token: Annotated[
        int, Field(ge=1, le=64, description="sampled labels of every token, each sent back by itself; 1 or more")
    ] = 1
    gradient_clip: Annotated[
        float,
        Field(ge=0, description="how many times the median of its window a token's gradient may be; 0 for no limit"),
    ] = 0.0


class SharingOptions(Options):
    """Options of a method that lets the same weight of neighbouring blocks share a basis."""

    group_size: Annotated[int, Field(ge=1, description="at least 1 block, as many as may share a basis")] = 1
    sharing: Annotated[
        Literal["measured", "paper", "all", "none"],
        Field(description="which groups share: where it loses less, by the paper's table, all that may, or none"),
    ] = "measured"


C = TypeVar("C", bound=Options, default=Any)


def nothing(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require nothing of the forward pass."""
    return frozenset()


@dataclass(frozen=True)
class LowRankMethod(Configured[C]):
    """A low-rank method. Satisfies :class:`pared.methods.Method`.

    Attributes:
        name: what a recipe calls it.
        paper: where it comes from.
        summary: what it minimises, in a line.
        config: its options; the type belongs to this method alone. A method of gradients has
            :class:`GradientOptions`, one whose basis may be shared :class:`SharingOptions`.
        requires: names of the statistics of the forward pass it reads, from the shapes ``(out, in)`` of the sites that
            read one tensor and the options.
        solve: from weights ``(out, in)``, the statistics of each by name and the options to a decomposition, which
            answers every rank: of one weight, or of several that get one basis, stacked; none where there are widths
            alone.
        losses: as ``solve``, for one weight of which only the losses are asked, where that takes less; what it gives
            has no directions.
        gradients: names of the statistics it reads of a backward pass, from its options.
        shrinkage: how far statistics are drawn towards equal energies before the method or anything else reads them
            (:mod:`pared.lowrank.shrinkage`), by name, from its options; one that is not named is not.
        allocation: the allocator its paper uses.
        pivoted: whether its results are stored by pivots unless a recipe says otherwise.
        statistics: when statistics are collected at a budget ``keep``, unless a recipe says otherwise: ``once``, or
            ``sequential``, behind the compressed prefix.
        refit: which refit stage follows at a budget ``keep``, unless a recipe says otherwise.
        dense_path: share of the dense model's outputs in the targets of both, unless a recipe says otherwise.
        input_gram: name of the statistic that is the input Gram, with which sharing is compared.
        widths: from the layers of a channel group and the options to the order of its channels, whose losses are in the
            unit of ``solve``'s; none where there is no such thing.
        shifts: whether its widths add a bias to what reads the channels.
        heads: whether heads are taken out too with widths alone, unless a recipe says otherwise; none: where the
            allocation looks at the text.
        experts: from what was seen of the experts of a mixture and the options to their order; none where there is no
            such thing. A backward pass is run for it where the method has ``gradients``, a forward pass else.
        structures: what is made smaller at a budget ``keep``, unless a recipe says otherwise.
        operations: what ``solve`` takes of the weights that read one tensor, from their shapes ``(out, in)`` and the
            options, by which ``pared plan --cost`` predicts its time; none where that is not known.
    """

    name: str
    paper: str
    summary: str
    config: type[C]
    solve: "Callable[[Sequence[torch.Tensor], Sequence[Statistics], C], Decomposition] | None"
    requires: Callable[[Shapes, C], frozenset[str]] = nothing
    gradients: Callable[[C], frozenset[str]] = lambda _: frozenset()
    shrinkage: "Callable[[C], Mapping[str, Shrinkage]]" = lambda _: {}
    allocation: str = "uniform"
    pivoted: bool = False
    statistics: Callable[[float], str] = lambda _: "once"
    refit: Callable[[float], str] = lambda _: "off"
    dense_path: float = 0.0
    input_gram: str = "gram"
    widths: Callable[[Any, C], Any] | None = None  # of a pared.widths.GroupLayers a pared.widths.Channels, from above
    shifts: bool = False
    heads: bool | None = None
    experts: Callable[[Any, C], Any] | None = None  # of pared.widths.MixtureMoments a pared.widths.Experts, from above
    structures: Callable[[float], str] = lambda _: "ranks"
    kind: ClassVar[Kind] = "method"
    operations: Callable[[Shapes, C], Sequence[Operation]] | None = None
    losses: "Callable[[Sequence[torch.Tensor], Sequence[Statistics], C], Decomposition] | None" = None
    family: ClassVar[Literal["low_rank"]] = "low_rank"

    def decompose(
        self, W_ON: "torch.Tensor", statistics: Statistics, options: Mapping[str, object] | Options | None = None
    ) -> "Decomposition":
        """Decompose one weight ``(out, in)``, with the default of every option that is not given.

        Raises:
            ParedError: the method lowers no rank.
        """
        return self.require_solve()([W_ON], [statistics], self.configured(options))

    def require_solve(self) -> "Callable[[Sequence[torch.Tensor], Sequence[Statistics], C], Decomposition]":
        """Return ``solve`` of a method that has it.

        Raises:
            ParedError: the method lowers no rank.
        """
        if self.solve is None:
            taken = "experts" if self.widths is None else "channels"
            raise ParedError(f"method {self.name} takes {taken} out and lowers no rank; take a method of ranks")
        return self.solve

    @property
    def shares(self) -> bool:
        """Whether several weights may get one basis."""
        return issubclass(self.config, SharingOptions)

    @property
    def calibrated(self) -> bool:
        """Whether it needs data at all, by default."""
        default = self.config()
        return bool(self.requires([(1, 1)], default) or self.gradients(default))


class Svd(Options):
    """Options of ``svd``."""


class Fwsvd(GradientOptions):
    """Options of ``fwsvd``."""

    fisher_batch: Annotated[int, Field(ge=1, description="the examples squared together, 1 or more")] = 1
    fisher_power: Annotated[float, Field(description="the power of an input feature's Fisher information")] = 0.5
    loss: Annotated[
        Literal["sampled", "labels"],
        Field(description="whose loss: of the text's labels, or of labels sampled from the model's own predictions"),
    ] = "labels"


class Asvd(Options):
    """Options of ``asvd``."""

    alpha: Annotated[float, Field(description="the power of an input channel's mean magnitude")] = 0.5


class SvdLlm(Options):
    """Options of ``svd-llm``."""


class SvdLlmV2(Options):
    """Options of ``svd-llm-v2``."""


class SwiftSvd(Options):
    """Options of ``swift-svd``."""


class BasisSharing(SharingOptions):
    """Options of ``basis-sharing``."""

    group_size: Annotated[int, Field(ge=1, description="at least 1 block, as many as may share a basis")] = 2


class LossOptimal(DrawnOptions, SharingOptions):
    """Options of ``loss-optimal``."""

    output_weighting: Annotated[
        Literal["none", "scalar", "diagonal", "full"],
        Field(description="what is collected of the output gradients: nothing, their mean energy, each output's, all"),
    ] = "full"
    input_shrinkage: Annotated[
        Annotated[float, Field(ge=0, le=1)] | Literal["auto"],
        Field(description="how far the input Gram is drawn towards its mean diagonal: 0 to 1, or auto, by the tokens"),
    ] = "auto"
    output_shrinkage: Annotated[
        Annotated[float, Field(ge=0, le=1)] | Literal["auto"],
        Field(description="how far the output gradients' moments are drawn towards their mean: 0 to 1, or auto"),
    ] = "auto"


def either_gram(shapes: Shapes, _: Options | None = None) -> frozenset[str]:
    """Require the Gram of the one input or those of the outputs, whichever is fewer products a token."""
    of_input = shapes[0][1] ** 2
    of_outputs = sum(out_features**2 for out_features, _ in shapes)
    return frozenset({"gram" if of_input <= of_outputs else "output_gram"})


def magnitude(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the mean magnitude of every input feature."""
    return frozenset({"magnitude"})


def gram(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the Gram of every input."""
    return frozenset({"gram"})


def mean_gram(_: Shapes, __: Options | None = None) -> frozenset[str]:
    """Require the Gram of the input per token."""
    return frozenset({"mean_gram"})


def fisher(options: Fwsvd) -> frozenset[str]:
    """Require the Fisher information of every weight; of as many examples squared together as the option says."""
    batch = options.fisher_batch
    return frozenset({"fisher" if batch == 1 else f"fisher:{batch}"})


def output_gradient(options: LossOptimal) -> frozenset[str]:
    """Require the second moments of the outputs' gradients, as far as the weighting asked for looks at them."""
    weighting = options.output_weighting
    return frozenset() if weighting == "none" else frozenset({f"output_gradient_{weighting}"})


def both_shrunk(options: LossOptimal) -> "dict[str, Shrinkage]":
    """Return how far the input Gram and the second moments of the outputs' gradients are shrunk."""
    return {"mean_gram": options.input_shrinkage} | dict.fromkeys(output_gradient(options), options.output_shrinkage)


UPDATE = 0.6  # basis-sharing updates the coefficients at this budget and below
SEQUENTIAL = 0.7  # loss-optimal collects its statistics behind the compressed prefix at this budget and below
DENSE_PATH = 0.25  # ours; Basis Sharing's own update has targets of the compressed model's inputs alone, 0

METHODS: dict[str, LowRankMethod] = {
    method.name: method
    for method in (
        LowRankMethod(
            name="svd",
            paper="Eckart and Young, 1936",
            summary="least error of the weight itself; needs no data",
            config=Svd,
            solve=deferred("pared.lowrank.rules:plain"),
            operations=operations.scaled,
        ),
        LowRankMethod(
            name="fwsvd",
            paper="Hsu et al., ICLR 2022 (arXiv 2207.00112)",
            summary="least error of the weight, input features weighted by the Fisher information of the task loss",
            config=Fwsvd,
            solve=deferred("pared.lowrank.rules:fisher_weighted"),
            operations=operations.scaled,
            gradients=fisher,
        ),
        LowRankMethod(
            name="asvd",
            paper="Yuan et al., 2023 (arXiv 2312.05821), exact SVD",
            summary="least error of the weight, input channels scaled by their mean magnitude to the power alpha",
            config=Asvd,
            solve=deferred("pared.lowrank.rules:scaled"),
            operations=operations.scaled,
            requires=magnitude,
        ),
        LowRankMethod(
            name="svd-llm",
            paper="Wang et al., ICLR 2025 (arXiv 2403.07378), whitening",
            summary="least error of the layer's output on the calibration data",
            config=SvdLlm,
            solve=deferred("pared.lowrank.rules:whitened"),
            operations=operations.whitened,
            requires=either_gram,
        ),
        LowRankMethod(
            name="svd-llm-v2",
            paper="Wang et al., NAACL 2025 (arXiv 2503.12340)",
            summary="svd-llm with more kept, within a kind of layer, where uniform ranks lose more",
            config=SvdLlmV2,
            solve=deferred("pared.lowrank.rules:whitened"),
            operations=operations.whitened,
            requires=either_gram,
            allocation="svd-llm-v2",
        ),
        LowRankMethod(
            name="swift-svd",
            paper="Qi et al., ICML 2026 (arXiv 2604.01609)",
            summary="svd-llm by eigenvectors of the outputs' covariance; ranks by loss and influence, tried on a text",
            config=SwiftSvd,
            solve=deferred("pared.lowrank.rules:whitened"),
            operations=operations.whitened,
            requires=either_gram,
            allocation="swift",
        ),
        LowRankMethod(
            name="basis-sharing",
            paper="J. Wang et al., ICLR 2025 (arXiv 2410.03765)",
            summary="svd-llm with one basis for the same weight of neighbouring blocks, where that loses less",
            config=BasisSharing,
            solve=deferred("pared.lowrank.rules:whitened"),
            losses=deferred("pared.lowrank.rules:whitened_losses"),
            operations=operations.whitened,
            requires=either_gram,
            refit=lambda keep: "update" if keep <= UPDATE else "off",
            dense_path=DENSE_PATH,
        ),
        LowRankMethod(
            name="loss-optimal",
            paper="K-FAC on both sides, as GFWSVD (arXiv 2505.17974), OBD-LLM (2604.00821), IO-SVD (2605.15626) and "
            "KFAC-SVD (ICML 2026); the budget in nats over ranks, dense and sharing is ours",
            summary="least expected increase of the loss, inputs and output gradients weighted, one global budget",
            config=LossOptimal,
            solve=deferred("pared.lowrank.rules:both_sides"),
            operations=operations.both_sides,
            requires=mean_gram,
            gradients=output_gradient,
            shrinkage=both_shrunk,
            allocation="loss",
            pivoted=True,
            statistics=lambda keep: "sequential" if keep <= SEQUENTIAL else "once",
            dense_path=DENSE_PATH,
            input_gram="mean_gram",
            widths=deferred("pared.widths.rules:both_sides"),
            structures=lambda _: "mixed",
            experts=deferred("pared.widths.rules:experts"),
        ),
    )
}
