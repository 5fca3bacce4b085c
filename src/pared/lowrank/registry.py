"""The low-rank methods, one declaration each: which statistics it needs and how one weight is decomposed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pared.lazy import deferred

if TYPE_CHECKING:  # what a method is called and which options it has is read without it
    import torch

    from pared.lowrank.decomposition import Decomposition

Statistics = Mapping[str, "torch.Tensor"]
Rule = Callable[["torch.Tensor", Statistics, Mapping[str, Any]], "Decomposition"]
GroupRule = Callable[[Sequence["torch.Tensor"], Sequence[Statistics], Mapping[str, Any]], "Decomposition"]


@dataclass(frozen=True)
class LowRankMethod:
    """A low-rank method.

    Attributes:
        name: what a recipe calls it.
        paper: where it comes from.
        summary: what it minimises, in a line.
        needs: names of the statistics it reads, from the shapes ``(out, in)`` of the sites that read one tensor.
        rule: from a weight ``(out, in)``, those statistics by name and the options to a decomposition.
        gradients: names of the statistics it reads of a backward pass, from its options. A method that has any has the
            option ``loss``: that of labels ``sampled`` from the model's own predictions, or of the text's ``labels``.
        options: names and default values; a recipe may set others of the same type.
        allocation: the allocator its paper uses.
        pivoted: whether its results are stored by pivots unless a recipe says otherwise.
        statistics: when statistics are collected at a budget ``keep``, unless a recipe says otherwise: ``once``, or
            ``sequential``, behind the compressed prefix.
        refit: which refit stage follows at a budget ``keep``, unless a recipe says otherwise.
        dense_path: share of the dense model's outputs in the targets of both, unless a recipe says otherwise.
        group_rule: as ``rule`` for several weights that get one basis, stacked; none if a basis cannot be shared. A
            method that has one has the options ``group_size`` and ``sharing``.
        input_gram: name of the statistic that is the input Gram, with which sharing is compared.
    """

    name: str
    paper: str
    summary: str
    needs: Callable[[Sequence[tuple[int, int]]], frozenset[str]]
    rule: Rule
    gradients: Callable[[Mapping[str, Any]], frozenset[str]] = lambda _: frozenset()
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    allocation: str = "uniform"
    pivoted: bool = False
    statistics: Callable[[float], str] = lambda _: "once"
    refit: Callable[[float], str] = lambda _: "off"
    dense_path: float = 0.0
    group_rule: GroupRule | None = None
    input_gram: str = "gram"

    def decompose(
        self,
        W_ON: "torch.Tensor",
        statistics: Statistics,
        options: Mapping[str, object] | None = None,
    ) -> "Decomposition":
        """Decompose one weight ``(out, in)``, with the default of every option that is not given."""
        return self.rule(W_ON, statistics, {**self.options, **(options or {})})

    def check(self, options: Mapping[str, object]) -> None:
        """Refuse values that an option does not have.

        Raises:
            ValueError: names the option.
        """
        self.gradients(options)
        if "sharing" in self.options:
            _one_of(options, "sharing", SHARING)
            if not isinstance(size := options["group_size"], int) or size < 1:
                raise ValueError(f"option group_size: expected at least 1 block, found {size}")

    @property
    def calibrated(self) -> bool:
        """Whether it needs data at all."""
        return self.walked or bool(self.gradients(self.options))

    @property
    def walked(self) -> bool:
        """Whether it needs statistics of the forward pass."""
        return bool(self.needs([(1, 1)]))


def nothing(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need no data."""
    return frozenset()


def either_gram(shapes: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the Gram of the one input or those of the outputs, whichever is fewer products a token."""
    of_input = shapes[0][1] ** 2
    of_outputs = sum(out_features**2 for out_features, _ in shapes)
    return frozenset({"gram" if of_input <= of_outputs else "output_gram"})


def gram(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the Gram of every input."""
    return frozenset({"gram"})


def magnitude(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the mean magnitude of every input feature."""
    return frozenset({"magnitude"})


def mean_gram(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the Gram of the input per token."""
    return frozenset({"mean_gram"})


UPDATE = 0.6  # basis-sharing updates the coefficients at this budget and below
SEQUENTIAL = 0.7  # loss-optimal collects its statistics behind the compressed prefix at this budget and below
DENSE_PATH = 0.25  # ours; Basis Sharing's own update has targets of the compressed model's inputs alone, 0
SHARING = ("measured", "paper", "all", "none")
WEIGHTINGS = ("none", "scalar", "diagonal", "full")
LOSSES = ("sampled", "labels")


def _one_of(options: Mapping[str, Any], name: str, valid: Sequence[str]) -> str:
    if options[name] not in valid:
        raise ValueError(f"option {name}: expected one of {', '.join(valid)}, found {options[name]!r}")
    return str(options[name])


def fisher(options: Mapping[str, Any]) -> frozenset[str]:
    """Need the Fisher information of every weight; of as many examples squared together as the option says."""
    _one_of(options, "loss", LOSSES)
    batch = options["fisher_batch"]
    if batch < 1:
        raise ValueError(f"option fisher_batch: expected the examples squared together, 1 or more, found {batch}")
    return frozenset({"fisher" if batch == 1 else f"fisher:{batch}"})


def output_gradient(options: Mapping[str, Any]) -> frozenset[str]:
    """Need the second moments of the outputs' gradients, as far as the weighting asked for looks at them."""
    _one_of(options, "loss", LOSSES)
    weighting = _one_of(options, "output_weighting", WEIGHTINGS)
    return frozenset() if weighting == "none" else frozenset({f"output_gradient_{weighting}"})


METHODS = {
    method.name: method
    for method in (
        LowRankMethod(
            name="svd",
            paper="Eckart and Young, 1936",
            summary="least error of the weight itself; needs no data",
            needs=nothing,
            rule=deferred("pared.lowrank.rules:plain"),
        ),
        LowRankMethod(
            name="fwsvd",
            paper="Hsu et al., ICLR 2022 (arXiv 2207.00112)",
            summary="least error of the weight, input features weighted by the Fisher information of the task loss",
            needs=nothing,
            rule=deferred("pared.lowrank.rules:fisher_weighted"),
            gradients=fisher,
            options={"fisher_batch": 1, "fisher_power": 0.5, "loss": "labels"},
        ),
        LowRankMethod(
            name="asvd",
            paper="Yuan et al., 2023 (arXiv 2312.05821), exact SVD",
            summary="least error of the weight, input channels scaled by their mean magnitude to the power alpha",
            needs=magnitude,
            rule=deferred("pared.lowrank.rules:scaled"),
            options={"alpha": 0.5},
        ),
        LowRankMethod(
            name="svd-llm",
            paper="Wang et al., ICLR 2025 (arXiv 2403.07378), whitening",
            summary="least error of the layer's output on the calibration data",
            needs=either_gram,
            rule=deferred("pared.lowrank.rules:whitened"),
        ),
        LowRankMethod(
            name="svd-llm-v2",
            paper="Wang et al., NAACL 2025 (arXiv 2503.12340)",
            summary="svd-llm with more kept, within a kind of layer, where uniform ranks lose more",
            needs=either_gram,
            rule=deferred("pared.lowrank.rules:whitened"),
            allocation="svd-llm-v2",
        ),
        LowRankMethod(
            name="swift-svd",
            paper="Qi et al., ICML 2026 (arXiv 2604.01609)",
            summary="svd-llm by eigenvectors of the outputs' covariance; ranks by loss and influence, tried on a text",
            needs=either_gram,
            rule=deferred("pared.lowrank.rules:whitened"),
            allocation="swift",
        ),
        LowRankMethod(
            name="basis-sharing",
            paper="J. Wang et al., ICLR 2025 (arXiv 2410.03765)",
            summary="svd-llm with one basis for the same weight of neighbouring blocks, where that loses less",
            needs=either_gram,
            rule=deferred("pared.lowrank.rules:whitened"),
            options={"group_size": 2, "sharing": "measured"},
            refit=lambda keep: "update" if keep <= UPDATE else "off",
            dense_path=DENSE_PATH,
            group_rule=deferred("pared.lowrank.rules:whitened_group"),
        ),
        LowRankMethod(
            name="loss-optimal",
            paper="K-FAC on both sides, as GFWSVD (arXiv 2505.17974), OBD-LLM (2604.00821), IO-SVD (2605.15626) and "
            "KFAC-SVD (ICML 2026); the budget in nats over ranks, dense and sharing is ours",
            summary="least expected increase of the loss, inputs and output gradients weighted, one global budget",
            needs=mean_gram,
            rule=deferred("pared.lowrank.rules:both_sides"),
            gradients=output_gradient,
            options={"output_weighting": "full", "loss": "sampled", "group_size": 1, "sharing": "measured"},
            allocation="loss",
            pivoted=True,
            statistics=lambda keep: "sequential" if keep <= SEQUENTIAL else "once",
            dense_path=DENSE_PATH,
            group_rule=deferred("pared.lowrank.rules:both_sides_group"),
            input_gram="mean_gram",
        ),
    )
}
