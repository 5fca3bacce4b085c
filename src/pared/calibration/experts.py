"""What taking an expert out does to a token: what the router picks in its place, and what the loss makes of that.

Legend of the shape suffixes: T tokens, N features, E experts, P those that a token is given to, D draws of labels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pared.calibration.activations import drop_padding
from pared.calibration.statistics.experts import ExpertLoss
from pared.errors import ParedError
from pared.structure.groups import RefusedError
from pared.structure.mixture import Placed, Routed

RootCall = tuple[tuple[Any, ...], dict[str, Any]]

PAIRS = 4096  # tokens, each with one expert, that run at once


class ExpertTap:
    """Watches one mixture in the runs of a block in one batch, and then updates its statistic.

    Args:
        placed: the mixture in the block that runs.
        statistic: that is updated.
        draws: how many gradients will come by, one for every draw of labels; of none only norms are taken in.
    """

    def __init__(self, placed: Placed, statistic: ExpertLoss, draws: int) -> None:
        self._placed, self._statistic, self._draws = placed, statistic, draws
        self._root: RootCall = ((), {})
        self._finishing = False  # experts run again then, under the same hooks
        self._calls: list[tuple[RootCall, Routed, torch.Tensor | None]] = []

    def hooked(self) -> Iterator[Any]:
        """Hook the modules for one run."""
        yield self._placed.root.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield self._placed.experts.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._root = (_detached(args), _detached(kwargs))

    def _leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if self._finishing:
            return
        with _as_proved(self._placed.mixture.name):
            root, routed = self._root, Routed.seen(_detached(args), _detached(kwargs))
        drawn: list[torch.Tensor] = []

        def receive(g_TN: torch.Tensor) -> None:
            drawn.append(g_TN.detach().reshape(len(routed.picks[0]), -1))
            if len(drawn) == self._draws:  # the experts run once for all
                self._calls.append((root, routed, torch.stack(drawn)))

        if not self._draws:
            self._calls.append((root, routed, None))
        elif output.requires_grad:
            output.register_hook(receive)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def finish(self, mask_BT: torch.Tensor | None) -> None:
        """Update the statistic with what was seen.

        Args:
            mask_BT: which tokens of the batch are no padding; none if all are.

        Raises:
            ParedError: it is NaN or infinite, or the router picks more or fewer than when it was proved.
        """
        name, self._finishing = self._placed.mixture.name, True
        for root, routed, g_DTN in self._calls:
            with _as_proved(name):
                u_TDE, norm_TE = _changes(self._placed, root, routed, g_DTN)
            both = (drop_padding(one, mask_BT, name) for one in (u_TDE.flatten(1), norm_TE))
            self._statistic.update(*(one.reshape(-1, one.shape[-1]) for one in both))
        self._calls.clear()
        self._finishing = False
        if not self._statistic.finite():
            raise ParedError(
                f"experts {name}: what they output or its gradient is NaN or infinite; check the weights around them, "
                "or calibrate in float32"
            )


@contextmanager
def _as_proved(name: str) -> Iterator[None]:
    """Tell the user of a mixture that does something else on this text than it was proved by.

    Raises:
        ParedError: it does.
    """
    try:
        yield
    except RefusedError as why:
        raise ParedError(
            f"experts {name}: {why} on the calibration text, unlike in the probe pass; take ranks or widths"
        ) from None


def _changes(
    placed: Placed, root: RootCall, routed: Routed, g_DTN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what taking out every expert changes the loss by, to first order, and norms as :class:`ExpertLoss` has it.

    The former is ``(T, D, E)``; without gradients it is zero.

    What an expert makes of a token is computed once, whichever is gone: the outputs differ in which are summed up, and
    with which weights.

    Raises:
        RefusedError: the router picks more or fewer than when it was proved.
    """
    mixture, (index_TP, weights_TP) = placed.mixture, routed.picks
    _require_picks(index_TP, mixture.picked, "")
    index_TP, experts, device = index_TP.long(), mixture.experts, index_TP.device
    picked_TE = torch.zeros(len(index_TP), experts, dtype=torch.bool, device=device).scatter_(1, index_TP, True)
    wanted_TE, without = picked_TE.clone(), dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for j in range(experts) if g_DTN is not None else ():
        rows_R = (torch.ones_like(picked_TE[:, j]) if mixture.rescales else picked_TE[:, j]).nonzero()[:, 0]
        if len(rows_R):
            kept_K = torch.tensor([one for one in range(experts) if one != j])
            other_TP, others_TP = placed.rerouted(kept_K, *root)
            _require_picks(other_TP, mixture.picked, f" without expert {j}")
            without[j] = rows_R, other_TP[rows_R], others_TP[rows_R].double()
            wanted_TE[rows_R] |= torch.zeros_like(wanted_TE[rows_R]).scatter_(1, other_TP[rows_R], True)
    slope_DTE, norm_TE = _made(placed, routed, g_DTN, wanted_TE)
    before_DT = _summed(slope_DTE, index_TP, weights_TP.double())
    u_DTE = torch.zeros_like(slope_DTE)
    for j, (rows_R, other_RP, others_RP) in without.items():
        u_DTE[:, rows_R, j] = _summed(slope_DTE[:, rows_R], other_RP, others_RP) - before_DT[:, rows_R]
    share_TE = torch.full_like(norm_TE, torch.nan).scatter_(1, index_TP, weights_TP.to(norm_TE.dtype))
    return u_DTE.transpose(0, 1), share_TE * norm_TE


def _summed(slope_DTE: torch.Tensor, index_TP: torch.Tensor, weights_TP: torch.Tensor) -> torch.Tensor:
    """Return, of the experts that a token is given to, the sum with their weights, ``(D, T)``."""
    return (weights_TP * slope_DTE.gather(2, index_TP.expand(len(slope_DTE), -1, -1))).sum(dim=2)


def _require_picks(index_TP: torch.Tensor, picked: int, where: str) -> None:
    if index_TP.shape[1] != picked:
        raise RefusedError(f"its router gives a token to {index_TP.shape[1]} experts{where}, not to {picked},")


def _made(
    placed: Placed, routed: Routed, g_DTN: torch.Tensor | None, wanted_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for tokens and experts that are wanted, ``gᵀf`` and the norm of what an expert makes of a token, f."""
    norm_TE = torch.zeros(wanted_TE.shape, dtype=torch.float64, device=wanted_TE.device)
    slope_DTE = norm_TE.new_zeros(1 if g_DTN is None else len(g_DTN), *wanted_TE.shape)
    hidden_TN = routed[routed.hidden]
    for part in torch.split(wanted_TE.nonzero(), PAIRS):
        token_R, expert_R = part.unbind(dim=1)
        ones = torch.ones(len(part), 1, dtype=routed.picks[1].dtype, device=part.device)
        made_RN = routed.run(placed.experts, hidden_TN[token_R], expert_R[:, None], ones).float()
        for slope_TE, g_TN in zip(slope_DTE, () if g_DTN is None else g_DTN, strict=False):
            slope_TE[token_R, expert_R] = (made_RN.double() * g_TN[token_R].double()).sum(dim=1)
        norm_TE[token_R, expert_R] = made_RN.double().norm(dim=1)
    return slope_DTE, norm_TE


def _detached(value: Any) -> Any:
    """Return arguments without their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(one) for name, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    return value
