"""Statistics of what a site reads and puts out: small accumulators with ``update`` and ``merge``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from pared.calibration.precision import exact_products
from pared.errors import ParedError
from pared.names import did_you_mean

PANEL = 192  # columns of one panel of a Gram; only panels on and above the diagonal are multiplied
# Rows that are converted to float32 at a time, so that what was converted is still in a cache when it is used.
PRODUCT_ROWS, SUM_ROWS = 4096, 256


class Collected(Protocol):
    """What a method is given: the value of a statistic, and over how many tokens."""

    @property
    def tokens(self) -> int:
        """How many tokens were seen; 0 if none reached the site."""

    @property
    def value(self) -> torch.Tensor:
        """The statistic over everything seen."""


class Statistic(Protocol):
    """One accumulator for a tensor that sites read, or that one site puts out."""

    tokens: int

    @property
    def value(self) -> torch.Tensor:
        """The statistic over everything seen so far."""

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch ``(..., features)``."""

    def merge(self, other: "Statistic") -> None:
        """Take in what another accumulator of the same kind has seen."""

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""


class Gram:
    """The Gram ``G = Σ xᵀx`` over tokens, ``(features, features)``, not normalised.

    One batch is multiplied in float32 (exactly, for half-precision inputs, with float32 accumulation) and added to a
    float64 total. Only the upper panels are computed; ``value`` mirrors them.

    Attributes:
        tokens: how many tokens were seen.
        dtype: what the inputs came in, for the manifest.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.dtype: torch.dtype | None = None
        self._upper_NN = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add one batch ``(..., features)``."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        self.dtype = x.dtype
        with exact_products(x.dtype):
            for rows_TN in torch.split(x_TN, PRODUCT_ROWS):
                self._add(rows_TN.float())

    def _add(self, x_TN: torch.Tensor) -> None:
        width = x_TN.shape[1]
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            product = x_TN[:, start:stop].T @ x_TN[:, start:]
            if not bool(product.diagonal().isfinite().all()):  # squares of finite numbers may leave float32
                product = x_TN[:, start:stop].double().T @ x_TN[:, start:].double()
            self._upper_NN[start:stop, start:] += product

    def merge(self, other: Statistic) -> None:
        """Add what another Gram has seen."""
        assert isinstance(other, Gram)
        self._upper_NN += other._upper_NN.to(self._upper_NN.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        """The Gram ``(features, features)``, float64, symmetric."""
        upper_NN = self._upper_NN.triu()
        return upper_NN + upper_NN.triu(1).T

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number: a sum of squares keeps every NaN and infinity."""
        return bool(self._upper_NN.diagonal().isfinite().all())


class MeanGram(Gram):
    """The Gram per token, ``E[xᵀx]``: losses weighted by it do not depend on how much text there was."""

    @property
    def value(self) -> torch.Tensor:
        """The Gram over the number of tokens ``(features, features)``."""
        return super().value / max(self.tokens, 1)


CROSS = "cross"  # the name of the statistic below, which a walk of two paths adds to those that are asked for


class Cross:
    """What a site reads on two paths, ``E[xᵀx']`` per token, ``(features, features)``, float64.

    Of the dense path ``x`` and of the compressed one ``x'``, the same tokens in both. Where a batch sends a site other
    tokens on the two paths (a routed expert) nothing is added, and ``tokens`` falls behind those of a Gram.

    Attributes:
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum_NN = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, dense: torch.Tensor, own: torch.Tensor) -> None:
        """Add one batch of both, ``(..., features)``, row by row the same tokens."""
        x_TN, own_TN = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dense, own))
        self.tokens += len(own_TN)
        with exact_products(own.dtype):
            for x_RN, own_RN in zip(torch.split(x_TN, PRODUCT_ROWS), torch.split(own_TN, PRODUCT_ROWS), strict=True):
                self._sum_NN += x_RN.float().T @ own_RN.float()

    def merge(self, other: "Cross") -> None:
        """Add what another one has seen."""
        self._sum_NN += other._sum_NN.to(self._sum_NN.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        """The mean over tokens ``(features, features)``."""
        return self._sum_NN / max(self.tokens, 1)

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return bool(self._sum_NN.isfinite().all())


class Energy:
    """The energy ``Σ x²`` of every feature over tokens, ``(features,)``, float64, not normalised.

    Attributes:
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.value = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add one batch ``(..., features)``, summed in float32."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        for rows_TN in torch.split(x_TN, SUM_ROWS):
            energy_N = rows_TN.float().square().sum(dim=0)
            # Squares of finite numbers may leave float32.
            finite = bool(energy_N.isfinite().all())
            self.value += energy_N if finite else rows_TN.double().square().sum(dim=0)

    def merge(self, other: Statistic) -> None:
        """Add what another has seen."""
        assert isinstance(other, Energy)
        self.value += other.value.to(self.value.device)
        self.tokens += other.tokens

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return bool(self.value.isfinite().all())


def cross_of(own: Mapping[str, Collected], gram: str) -> Collected | None:
    """Return what a site reads on two paths, if that is of the same tokens as its Gram of this name."""
    cross = own.get(CROSS)
    return cross if cross is not None and gram in own and cross.tokens == own[gram].tokens else None


class Magnitude:
    """The mean magnitude of every feature over tokens, ``(features,)`` float64 (ASVD).

    Attributes:
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum_N = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add one batch ``(..., features)``."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        for rows_TN in torch.split(x_TN, SUM_ROWS):
            self._sum_N += rows_TN.float().abs().sum(dim=0)

    def merge(self, other: Statistic) -> None:
        """Add what another one has seen."""
        assert isinstance(other, Magnitude)
        self._sum_N += other._sum_N.to(self._sum_N.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        """The mean over tokens ``(features,)``."""
        return self._sum_N / max(self.tokens, 1)

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return bool(self._sum_N.isfinite().all())


@dataclass(frozen=True)
class StatisticKind:
    """A statistic by name: its accumulator, and which end of a site it watches.

    Attributes:
        accumulator: made from the number of features and the device.
        of: ``input`` is collected once for all sites that read one tensor; ``output`` is a site's own output without
            its bias.
    """

    accumulator: Callable[[int, torch.device], Statistic]
    of: Literal["input", "output"]


SUMMED = frozenset({"gram", "energy", "output_gram", "fisher"})  # statistics whose value grows with the tokens


def per_token(name: str, collected: Collected, tokens: int = 0) -> torch.Tensor:
    """Return a statistic per token of the text, so that what is made of it does not depend on how much text there was.

    A sum is divided by the tokens. A site that only a part of them reaches (an expert) counts for that part, and one
    whose block runs several times for that many: its mean Gram is weighed by it, as what its outputs cost the loss is.

    Args:
        name: of the statistic.
        collected: what was seen of it.
        tokens: of the text, padding aside; those that reached the site where they are not known.
    """
    tokens = max(tokens or collected.tokens, 1)
    if name.partition(":")[0] in SUMMED:
        return collected.value / tokens
    return collected.value * (collected.tokens / tokens) if name == "mean_gram" else collected.value


def require_statistics(names: Collection[str], known: Collection[str]) -> None:
    """Refuse names of statistics that do not exist.

    Raises:
        ParedError: there is one, or there is no name at all; says which exist.
    """
    if isinstance(names, str) or not names:
        raise ParedError(f"statistics: expected a set of names, got {names!r}; there are {', '.join(sorted(known))}")
    for name in sorted(names):
        kind, colon, number = name.partition(":")
        groups = number.isascii() and number.isdigit() and int(number) > 0
        if name not in known and not (kind == "fisher" and kind in known and colon and groups):
            raise ParedError(f"unknown statistic {name!r}; {did_you_mean(name, known)}")


STATISTICS = {
    "gram": StatisticKind(Gram, "input"),
    "mean_gram": StatisticKind(MeanGram, "input"),
    "magnitude": StatisticKind(Magnitude, "input"),
    "energy": StatisticKind(Energy, "input"),
    "output_gram": StatisticKind(Gram, "output"),
}
