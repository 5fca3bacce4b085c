"""Statistics of a backward pass: what the loss feels at the output of a site, and through its weight.

Legend: B examples, T tokens of each, N inputs and O outputs of the site; ``x_BTN`` is what the site reads, ``g_BTO``
the gradient of the summed loss with respect to what it puts out.
"""

from collections.abc import Callable, Collection
from typing import Literal, Protocol

import torch

from pared.calibration.precision import exact_products
from pared.calibration.statistics import STATISTICS, Energy, Gram, Statistic, StatisticKind
from pared.structure.model import Anatomy, Site

Form = Literal["scalar", "diagonal", "full"]


class GradientStatistic(Protocol):
    """One accumulator for what a site reads and the gradient of what it puts out."""

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""

    @property
    def by_example(self) -> bool:
        """Whether the examples of a batch must be told apart."""

    @property
    def value(self) -> torch.Tensor:
        """The statistic over everything seen so far."""

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor) -> None:
        """Take in one batch."""

    def merge(self, other: "GradientStatistic") -> None:
        """Take in what another accumulator of the same kind has seen."""

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""


class OutputGradient:
    """The output-gradient Gram ``E[gᵀg]`` per token, whole or in part: the output factor of K-FAC.

    With labels sampled from the model's own predictions it is the ``B`` of ``E[ΔL] ≈ ½ tr(B D A Dᵀ)`` for a change
    ``D`` of the weight, ``A = E[xᵀx]`` (Martens and Grosse, 2015). A layer that runs several times in a pass costs the
    sum over its runs: both are means over all of them here, and :func:`~pared.calibration.statistics.per_token` weighs
    ``A`` by how often the layer runs for a token of the text, as it does where only some tokens reach a layer.

    Attributes:
        form: ``full`` is ``(O, O)``; ``diagonal`` its diagonal ``(O,)``; ``scalar`` the mean of that, 0-d.
        by_example: False.
    """

    by_example = False

    def __init__(self, features: int, device: torch.device, form: Form) -> None:
        self.form = form
        self._sum: Statistic = Gram(features, device) if form == "full" else Energy(features, device)

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self._sum.tokens

    @property
    def value(self) -> torch.Tensor:
        """The Gram, its diagonal or the mean of that, per token; float64; zero before the first token."""
        per_token = self._sum.value / max(self.tokens, 1)
        return per_token.mean() if self.form == "scalar" else per_token

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch."""
        self._sum.update(g_BTO)

    def merge(self, other: GradientStatistic) -> None:
        """Add what another of the same form has seen."""
        assert isinstance(other, OutputGradient)
        assert other.form == self.form
        self._sum.merge(other._sum)

    def finite(self) -> bool:
        """Whether every gradient so far was a finite number."""
        return self._sum.finite()


class Fisher:
    """FWSVD's importance of every input feature (Hsu et al., ICLR 2022, arXiv 2207.00112), ``(N,)``, float64.

    The empirical Fisher is the squared gradient of the weight, summed over examples; its sum over outputs,
    ``I_i = Σ_b Σ_o (dL_b / dW_oi)²`` for torch's ``W (O, N)``, is one number for every input. Not normalised: a
    factor common to all of them changes nothing.

    With a ``batch`` above 1 the examples are taken in groups of so many, in order, and the gradient of a group's summed
    loss is squared instead: cheaper, and a proxy. Groups do not depend on the calibration batches: one that a batch
    leaves open is filled by the next. The last group may be smaller, and counts by what it holds. Memory: one
    ``(O, N)`` float32 gradient at a time, and beside it that of an open group; between calibration batches of a
    multiple of ``batch`` examples none is open.

    Attributes:
        tokens: how many tokens were seen.
        batch: examples whose gradients are squared together.
        by_example: True.
    """

    by_example = True

    def __init__(self, in_features: int, device: torch.device, batch: int = 1) -> None:
        self.tokens = 0
        self.batch = batch
        self._closed_N = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._open_ON: torch.Tensor | None = None
        self._in_open = 0

    @property
    def value(self) -> torch.Tensor:
        """The importance ``(N,)``, an open group included."""
        return self._closed_N if self._open_ON is None else self._closed_N + self._open_ON.square().sum(dim=0)

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor) -> None:
        """Add one batch; products of half-precision values are exact and summed in float32."""
        done = 0
        with exact_products(torch.promote_types(x_BTN.dtype, g_BTO.dtype)):
            while done < len(x_BTN):
                taken = slice(done, done + self.batch - self._in_open)
                x_RN, g_RO = (tensor[taken].float().flatten(0, 1) for tensor in (x_BTN, g_BTO))
                self._add(g_RO.T @ x_RN, len(x_BTN[taken]))
                self.tokens += len(x_RN)
                done += len(x_BTN[taken])

    def _add(self, dW_ON: torch.Tensor, examples: int) -> None:
        self._open_ON = dW_ON if self._open_ON is None else self._open_ON + dW_ON
        self._in_open += examples
        if self._in_open == self.batch:
            self._closed_N, self._open_ON, self._in_open = self.value, None, 0

    def merge(self, other: GradientStatistic) -> None:
        """Add what another of the same kind has seen; a group that it left open is a smaller one of its own."""
        assert isinstance(other, Fisher)
        assert other.batch == self.batch
        self._closed_N = self._closed_N + other.value.to(self._closed_N.device)
        self.tokens += other.tokens

    def finite(self) -> bool:
        """Whether every gradient so far was a finite number."""
        return bool(self.value.isfinite().all())


class OfInput:
    """A statistic of what a site reads, collected beside those of gradients: it spares a method the walk.

    Attributes:
        by_example: False.
    """

    by_example = False

    def __init__(self, statistic: Statistic) -> None:
        self._statistic = statistic

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self._statistic.tokens

    @property
    def value(self) -> torch.Tensor:
        """What a walk would have collected."""
        return self._statistic.value

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch."""
        self._statistic.update(x_BTN)

    def merge(self, other: GradientStatistic) -> None:
        """Add what another of the same kind has seen."""
        assert isinstance(other, OfInput)
        self._statistic.merge(other._statistic)

    def finite(self) -> bool:
        """Whether every input so far was a finite number."""
        return self._statistic.finite()


def _of_input(kind: StatisticKind) -> Callable[[int, int, torch.device], GradientStatistic]:
    return lambda _, in_features, device: OfInput(kind.accumulator(in_features, device))


Maker = Callable[[int, int, torch.device], GradientStatistic]

# name -> accumulator of a site, from its (out, in) and the device; `fisher:N` squares N examples together.
GRADIENT_STATISTICS: dict[str, Maker] = {
    **{name: _of_input(kind) for name, kind in STATISTICS.items() if kind.of == "input"},
    "fisher": lambda _, in_features, device: Fisher(in_features, device),
    "output_gradient_scalar": lambda out_features, _, device: OutputGradient(out_features, device, "scalar"),
    "output_gradient_diagonal": lambda out_features, _, device: OutputGradient(out_features, device, "diagonal"),
    "output_gradient_full": lambda out_features, _, device: OutputGradient(out_features, device, "full"),
}


MEAN_SQUARES = frozenset({"output_gradient_scalar", "output_gradient_diagonal"})


def share_felt(names: Collection[str]) -> float:
    """Return the share of the windows that a backward pass for these statistics goes over.

    A Gram needs every token there is, and Fisher information is a paper's; mean squares are known from a quarter.
    """
    return 0.25 if MEAN_SQUARES.issuperset(names) else 1.0


def _maker(name: str) -> Maker:
    kind, _, batch = name.partition(":")
    if not batch:
        return GRADIENT_STATISTICS[name]
    assert kind == "fisher"
    return lambda _, in_features, device: Fisher(in_features, device, int(batch))


def gradient_accumulators(
    anatomy: Anatomy, names: Collection[str], device: torch.device
) -> dict[str, dict[str, GradientStatistic]]:
    """Make empty accumulators of these statistics for every site the probe pass reached.

    Sites that read one tensor share what is collected of it. The Grams and full output gradients of the whole model
    are held at once; every other statistic is a vector.
    """
    shared: dict[tuple[str, str], GradientStatistic] = {}

    def make(site: Site, name: str) -> GradientStatistic:
        made = _maker(name)(site.out_features, site.in_features, device)
        return shared.setdefault((site.reads, name), made) if isinstance(made, OfInput) else made

    return {site.name: {name: make(site, name) for name in names} for site in anatomy.sites if not site.idle}
