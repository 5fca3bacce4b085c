"""Statistics of a backward pass: the gradient of the loss at the output of a site, and through its weight.

Legend: B examples, T tokens of each, N inputs and O outputs of the site; ``x_BTN`` is what the site reads, ``g_BTO``
the gradient of the summed loss with respect to what it outputs.
"""

from typing import Literal

import torch
from torch import distributed

from pared.calibration.precision import exact_products
from pared.calibration.statistics.base import PRODUCT_ROWS, Of, State, Statistic, Summed, same_kind
from pared.calibration.statistics.features import Energy
from pared.calibration.statistics.gram import GradientGram
from pared.errors import ParedError

Form = Literal["scalar", "diagonal", "full"]


class OutputGradient:
    """The output-gradient Gram ``E[gᵀg]`` per token, whole or in part: the output factor of K-FAC.

    With labels sampled from the model's own predictions it is the ``B`` of ``E[ΔL] ≈ ½ tr(B D A Dᵀ)`` for a change
    ``D`` of the weight, ``A = E[xᵀx]`` (Martens and Grosse, 2015). A layer that runs several times in a pass costs the
    sum over its runs: both are means over all of them here, and :func:`~pared.calibration.statistics.per_token` weighs
    ``A`` by how often the layer runs for a token of the text, as it does where only some tokens reach a layer.

    Attributes:
        form: ``full`` is ``(O, O)``; ``diagonal`` its diagonal ``(O,)``; ``scalar`` the mean of that, 0-d.
        of: ``output_grad``.
        features: that the site outputs.
        by_example: False.
    """

    of: Of = "output_grad"
    by_example = False

    def __init__(self, features: int, device: torch.device, form: Form) -> None:
        self.form = form
        self.features = features
        full = form == "full"
        self._sum = GradientGram(features, device) if full else Energy(features, device, self.of)

    @property
    def signature(self) -> str:
        """Its form and width, in words."""
        return f"{type(self).__name__} ({self.form}) of {self.features} features"

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self._sum.tokens

    @property
    def value(self) -> torch.Tensor:
        """The Gram, its diagonal or the mean of that, per token; float64; zero before the first token."""
        if isinstance(self._sum, GradientGram):
            return self._sum.value.div_(max(self.tokens, 1))  # which is made anew every time
        per_token = self._sum.value / max(self.tokens, 1)
        return per_token.mean() if self.form == "scalar" else per_token

    @property
    def shrinkage(self) -> float:
        """How far the value is to be drawn towards equal energies, 0 to 1; of one number nothing is."""
        return 0.0 if self.form == "scalar" else self._sum.shrinkage

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch; gradients of several draws of labels come side by side, ``(B, T, D · O)``.

        What a token adds is then the mean over its draws, so that how well the Gram is known is told by tokens, which
        are what is independent, and not by draws.
        """
        assert g_BTO is not None
        if g_BTO.shape[-1] == self.features:
            self._sum.update(g_BTO)
        else:
            self._sum.update_drawn(g_BTO.reshape(-1, g_BTO.shape[-1] // self.features, self.features))

    def merge(self, other: Statistic) -> None:
        """Add what another of the same form has seen."""
        self._sum.merge(same_kind(self, other)._sum)

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have seen; each then holds all of it."""
        self._sum.all_reduce(group)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums, float64, and the tokens."""
        return self._sum.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Hold a copy of such a state."""
        self._sum.load_state_dict(state)

    def finite(self) -> bool:
        """Whether every gradient so far was a finite number."""
        return self._sum.finite()


class Fisher(Summed):
    """FWSVD's importance of every input feature (Hsu et al., ICLR 2022, arXiv 2207.00112), ``(N,)``, float64.

    The empirical Fisher is the squared gradient of the weight, summed over examples; its sum over outputs,
    ``I_i = Σ_b Σ_o (dL_b / dW_oi)²`` for torch's ``W (O, N)``, is one number for every input. Not normalised: a
    factor common to all of them changes nothing.

    With a ``batch`` above 1 the examples are taken in groups of so many, in order, and the gradient of a group's summed
    loss is squared instead: cheaper, and a proxy. Groups do not depend on the calibration batches: one that a batch
    leaves open is filled by the next. The last group may be smaller, and counts by what it holds; so does one that is
    open when another accumulator is merged into this one, or when ranks are added up. Memory: one ``(O, N)`` float32
    gradient at a time, and beside it that of an open group; between calibration batches of a multiple of ``batch``
    examples none is open.

    Attributes:
        of: ``weight_grad``.
        features: that the site reads.
        tokens: how many tokens were seen.
        batch: examples whose gradients are squared together.
        by_example: True.
    """

    by_example = True

    def __init__(self, in_features: int, device: torch.device, batch: int = 1) -> None:
        super().__init__(in_features, (in_features,), device, "weight_grad")  # the sum: over groups that are closed
        self.batch = batch
        self._open_ON: torch.Tensor | None = None
        self._in_open = 0

    @property
    def signature(self) -> str:
        """Its width and how many examples are squared together, in words."""
        return f"{super().signature}, {self.batch} examples squared together"

    @property
    def value(self) -> torch.Tensor:
        """The importance ``(N,)``, an open group included."""
        return self._sum if self._open_ON is None else self._sum + self._open_ON.square().sum(dim=0)

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor | None = None) -> None:
        """Add one batch; products of half-precision values are exact and summed in float32."""
        assert g_BTO is not None
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
            self._close()

    def _close(self) -> None:
        self._sum, self._open_ON, self._in_open = self.value, None, 0

    def merge(self, other: Statistic) -> None:
        """Add what another of the same kind has seen; a group that it left open is a smaller one of its own."""
        other = same_kind(self, other)
        self._sum = self._sum + other.value.to(self._sum.device)
        self.tokens += other.tokens

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have seen; a group of examples that is open is closed before."""
        self._close()
        super().all_reduce(group)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sum over closed groups, the tokens, and the gradient ``(O, N)`` of a group that is open."""
        state = {**super().state_dict(), "batch": torch.tensor(self.batch)}
        if self._open_ON is not None:
            state |= {"open": self._open_ON, "in_open": torch.tensor(self._in_open)}
        return state

    def load_state_dict(self, state: State) -> None:
        """Hold a copy of such a state.

        Raises:
            ParedError: it is of another kind or width, or of other groups.
        """
        if "batch" not in state or int(state["batch"]) != self.batch:
            found = f"of groups of {int(state['batch'])}" if "batch" in state else "of another statistic"
            raise ParedError(f"{self.signature}: got a state {found}; load what the same statistic has saved")
        super().load_state_dict(state)
        self._open_ON = state["open"].to(self._sum.device, copy=True) if "open" in state else None
        self._in_open = int(state["in_open"]) if "open" in state else 0


class WeightGradient(Summed):
    """The gradient of the summed loss through every weight, ``Σ gᵀx``, ``(O · N,)``, float64, row by row of the weight.

    What first-order Taylor scores of pruning are made of (LLM-Pruner). Memory: as many numbers as the weight has, and
    the float32 product of one batch.

    Attributes:
        of: ``weight_grad``.
        features: how many weights there are.
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, (features,), device, "weight_grad")

    def update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor | None = None) -> None:
        """Add one batch; products of half-precision values are exact and summed in float32."""
        assert g_BTO is not None
        x_TN, g_TO = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x_BTN, g_BTO))
        self.tokens += len(x_TN)
        with exact_products(torch.promote_types(x_BTN.dtype, g_BTO.dtype)):
            for x_RN, g_RO in zip(torch.split(x_TN, PRODUCT_ROWS), torch.split(g_TO, PRODUCT_ROWS), strict=True):
                self._sum += (g_RO.float().T @ x_RN.float()).flatten()
