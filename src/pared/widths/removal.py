"""Taking channels out of a layer's inputs, with a least-squares change of the weight that reads the others.

The hidden vector ``h`` of an MLP has one entry a channel, made by a row of ``gate`` and of ``up`` (or of ``fc1``) and
read by a column of ``down``. With the channels R gone and K kept, the weight of ``down`` that comes closest on the
calibration inputs, ``A = E[hᵀh]``, is ``W'_K = W_K + W_R A_RK A_KK⁻¹``. With ``D = W' - W`` (the columns of R become
zero) and ``B = L Lᵀ`` the Gram of the gradients at the outputs, the loss grows by ``½ tr(B D A Dᵀ)`` nats a token
(K-FAC), the unit of :mod:`pared.lowrank.loss_optimal`.

Let ``C`` be the Cholesky factor of A with the channels in the order in which they stay: those that go first come last.
``D C`` is zero in the first k columns and ``-W C`` in the others, so that keeping k channels costs
``½ Σ_{j>=k} z_j²``, ``z_j`` the norm of column j of ``Lᵀ W C``. The whole curve is read off one product, exactly.

The order is that of greedy elimination by the second-order score ``½ |(Lᵀ W)_j|² / [A⁻¹]_jj``, which is what taking out
channel j alone costs (Optimal Brain Surgeon, Hassibi and Stork, 1993, with outputs weighted); weight and inverse are
those that are left after every channel.

Legend of the shape suffixes: O outputs of the weight, N channels, K those that are kept, P a pool of channels.
"""

from dataclasses import dataclass

import torch

CHUNK = 16  # channels that are taken out between two updates of the whole inverse
POOL = 4  # times as many, the cheapest, are what a chunk is chosen from


@dataclass(frozen=True)
class Channels:
    """A weight and its channels in the order in which they stay, the last to go first. It answers every width.

    What goes is made up for in one of three ways: by the least squares on the calibration inputs, which changes the
    weight of what stays (``C_NN``); by its mean, which changes the bias (``mean_N``); or not at all.

    Attributes:
        W_ON: the weight ``(out, in)``, float64.
        order_G: the channels, int64.
        costs_N: ``z_j``, what leaving out the input at place j and all behind it adds, those of a channel side by side
            and the channels in that order; float64.
        C_NN: the Cholesky factor of the input Gram in that order, lower triangular.
        damping: what was added to the Gram's diagonal besides the usual, relative to its mean; 0 if nothing.
        fallback: what stands in for statistics that say nothing, for the record; empty if they were what was used.
        inputs: of the weight that one channel has, side by side.
        mean_N: the mean of every input ``(in,)``, in the order of the weight.
    """

    W_ON: torch.Tensor
    order_G: torch.Tensor
    costs_N: torch.Tensor
    C_NN: torch.Tensor | None = None
    damping: float = 0.0
    fallback: str = ""
    inputs: int = 1
    mean_N: torch.Tensor | None = None

    def loss(self, width: int) -> float:
        """Return what keeping so many channels costs, in the unit of the method: of ours, nats a token."""
        return 0.5 * float(self.costs_N[width * self.inputs :].square().sum())

    def kept(self, width: int) -> torch.Tensor:
        """Return the channels that stay, rising, int64 ``(width,)``."""
        return self.order_G[:width].sort().values

    def weight(self, width: int) -> torch.Tensor:
        """Return the weight that reads what stays ``(out, width · inputs)``, float64, in the order of ``kept``."""
        if self.C_NN is None:
            return self.W_ON[:, inputs_of(self.kept(width), self.inputs)]
        kept_K, gone_R = (inputs_of(one, self.inputs) for one in (self.order_G[:width], self.order_G[width:]))
        W_OK, W_OR, K = self.W_ON[:, kept_K], self.W_ON[:, gone_R], len(kept_K)
        C_KK, C_RK = self.C_NN[:K, :K].to(W_OK), self.C_NN[K:, :K].to(W_OK)
        # A_RK A_KK⁻¹ = C_RK C_KK⁻¹
        W_OK = W_OK + torch.linalg.solve_triangular(C_KK, W_OR @ C_RK, upper=False, left=False)
        return W_OK[:, kept_K.argsort()]

    def shift(self, width: int) -> torch.Tensor | None:
        """Return what is added to the bias ``(out,)``, float64: the mean output of what goes; None for nothing."""
        if self.mean_N is None:
            return None
        gone_R = inputs_of(self.order_G[width:], self.inputs)
        return self.W_ON[:, gone_R] @ self.mean_N[gone_R].to(self.W_ON)


def inputs_of(channels_G: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return the inputs of some channels, in their order, where each has so many side by side; int64."""
    return (channels_G[:, None] * inputs + torch.arange(inputs, device=channels_G.device)).flatten()


def remove_channels(
    W_ON: torch.Tensor,
    A_NN: torch.Tensor,
    L_OO: torch.Tensor,
    *,
    chunk: int = CHUNK,
    pool: int = POOL,
    least: int = 0,
    inputs: int = 1,
) -> Channels:
    """Order the channels that a weight reads by what they are worth.

    Args:
        W_ON: the weight ``(out, in)`` that reads the channels; computed in float64.
        A_NN: the Gram of its inputs per token ``(in, in)``, positive definite.
        L_OO: root of the Gram of the output gradients, ``B = L Lᵀ``: lower triangular ``(out, out)`` or a diagonal
            ``(out,)``.
        chunk: how many channels go between two updates of the whole inverse. They go one by one, by scores that are
            exact among the pool; 1 is greedy elimination to the letter, and what channels of several inputs get.
        pool: how many times as many channels, the cheapest, a chunk is chosen from.
        least: width at which to stop; below it the order is that of the scores there.
        inputs: of the weight that one channel has, side by side.

    Raises:
        ValueError: the Gram is not positive definite.
    """
    W_ON, A_NN = W_ON.double(), A_NN.double()
    weighted_ON = L_OO[:, None] * W_ON if L_OO.ndim == 1 else L_OO.T @ W_ON
    if inputs == 1:
        order_G = _order(weighted_ON.clone(), _inverse(A_NN), chunk, pool, least)
    else:
        order_G = _order_of_blocks(weighted_ON, _inverse(A_NN), inputs, least)
    return least_squares(W_ON, A_NN, order_G, inputs, weighted_ON)


def least_squares(
    W_ON: torch.Tensor,
    A_NN: torch.Tensor,
    order_G: torch.Tensor,
    inputs: int = 1,
    weighted_ON: torch.Tensor | None = None,
) -> Channels:
    """Return channels in a given order, with what their least squares costs.

    Args:
        W_ON: the weight ``(out, in)`` that reads the channels, float64.
        A_NN: the Gram of its inputs per token ``(in, in)``, positive definite, float64.
        order_G: the channels, those first that go last, int64.
        inputs: of the weight that one channel has, side by side.
        weighted_ON: ``Lᵀ W``, by which costs are weighted; W itself if it is not given.

    Raises:
        ValueError: the Gram is not positive definite.
    """
    order_N = inputs_of(order_G, inputs)
    C_NN = _cholesky(A_NN[order_N][:, order_N])
    costs_N = ((W_ON if weighted_ON is None else weighted_ON)[:, order_N] @ C_NN).norm(dim=0)
    return Channels(W_ON, order_G, costs_N, C_NN, inputs=inputs)


def in_order_of(scores_N: torch.Tensor, W_ON: torch.Tensor, inputs: int = 1) -> Channels:
    """Order the channels that a weight reads by given scores, those first that have most; nothing makes up for any.

    Args:
        scores_N: of every input ``(in,)``, not negative; a channel has the sum of those of its inputs.
        W_ON: the weight ``(out, in)``.
        inputs: of the weight that one channel has, side by side.
    """
    scores_N = scores_N.double()
    order_G = scores_N.view(-1, inputs).sum(dim=1).argsort(descending=True, stable=True)
    return Channels(W_ON.double(), order_G, scores_N[inputs_of(order_G, inputs)].sqrt(), inputs=inputs)


def _order_of_blocks(G_ON: torch.Tensor, H_NN: torch.Tensor, inputs: int, least: int) -> torch.Tensor:
    """Return the channels, those first that go last, where each has several inputs.

    Args:
        G_ON: ``Lᵀ W``.
        H_NN: the inverse of the Gram.
        inputs: of a channel.
        least: as of :func:`remove_channels`.
    """
    left_G = torch.arange(len(H_NN) // inputs, device=H_NN.device)
    gone: list[torch.Tensor] = []
    while len(left_G) > max(least, 1):
        at = int(_scores_of_blocks(G_ON, H_NN, inputs).argmin())
        stays_N = torch.ones(len(H_NN), dtype=torch.bool, device=H_NN.device)
        stays_N[at * inputs : (at + 1) * inputs] = False
        H_SK = H_NN[~stays_N][:, stays_N]
        X_SK = torch.linalg.solve(H_NN[~stays_N][:, ~stays_N], H_SK)
        G_ON = G_ON[:, stays_N] - G_ON[:, ~stays_N] @ X_SK
        H_NN = H_NN[stays_N][:, stays_N] - H_SK.T @ X_SK
        gone.append(left_G[at : at + 1])
        left_G = torch.cat([left_G[:at], left_G[at + 1 :]])
    last_G = left_G[_scores_of_blocks(G_ON, H_NN, inputs).argsort(descending=True, stable=True)]
    return torch.cat([last_G, *reversed(gone)])


def _scores_of_blocks(G_ON: torch.Tensor, H_NN: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return twice what taking out each of the channels alone costs: ``tr(G_S H_SS⁻¹ G_Sᵀ)``, S its inputs."""
    scores = []
    for start in range(0, len(H_NN), inputs):
        S = slice(start, start + inputs)
        C_SS = _cholesky(H_NN[S, S])
        scores.append(torch.linalg.solve_triangular(C_SS.T, G_ON[:, S], upper=True, left=False).square().sum())
    return torch.stack(scores)


def _order(G_ON: torch.Tensor, H_NN: torch.Tensor, chunk: int, pool: int, least: int) -> torch.Tensor:
    """Return the channels, those first that go last.

    Args:
        G_ON: ``Lᵀ W``; overwritten.
        H_NN: the inverse of the Gram; overwritten.
        chunk: as of :func:`remove_channels`; as are the others.
        pool: as above.
        least: as above.
    """
    left_N = torch.arange(len(H_NN), device=H_NN.device)
    gone: list[torch.Tensor] = []
    while len(left_N) > max(least, 1):
        size = min(chunk, len(left_N) - max(least, 1))
        scores_N = G_ON.square().sum(dim=0) / H_NN.diagonal()
        cheapest_P = scores_N.argsort(stable=True)[: pool * size] if size > 1 else scores_N.argmin()[None]
        S = cheapest_P[_among(G_ON[:, cheapest_P], H_NN[cheapest_P][:, cheapest_P], size)]
        stays_N = torch.ones(len(left_N), dtype=torch.bool, device=H_NN.device)
        stays_N[S] = False
        H_SK, H_SS = H_NN[S][:, stays_N], H_NN[S][:, S]
        X_SK = torch.linalg.solve(H_SS, H_SK)
        G_ON = G_ON[:, stays_N].addmm_(G_ON[:, S], X_SK, alpha=-1)
        H_NN = H_NN[stays_N][:, stays_N].addmm_(H_SK.T, X_SK, alpha=-1)
        gone.append(left_N[S])
        left_N = left_N[stays_N]
    scores_N = G_ON.square().sum(dim=0) / H_NN.diagonal()
    return torch.cat([left_N[scores_N.argsort(descending=True, stable=True)], *(S.flip(0) for S in reversed(gone))])


def _among(G_OP: torch.Tensor, H_PP: torch.Tensor, size: int) -> torch.Tensor:
    """Return which of some channels go, one after the other, each the cheapest once those before it are gone."""
    if size == len(H_PP) == 1:
        return torch.zeros(1, dtype=torch.int64, device=H_PP.device)
    M_PP, H_PP = G_OP.T @ G_OP, H_PP.clone()
    taken_P = torch.zeros(len(H_PP), dtype=torch.bool, device=H_PP.device)
    found = []
    for _ in range(size):
        diagonal_P = H_PP.diagonal().masked_fill(taken_P, 1)
        j = (M_PP.diagonal() / diagonal_P).masked_fill(taken_P, torch.inf).argmin()
        found.append(j)
        taken_P[j] = True
        # With x = H_j: / H_jj, the weight becomes G - G_j x and the inverse H - H_:j x.
        x_P = (H_PP[j] / H_PP[j, j]).masked_fill(taken_P, 0)
        m_P = M_PP[j].clone()
        M_PP.addr_(m_P, x_P, alpha=-1).addr_(x_P, m_P - m_P[j] * x_P, alpha=-1)
        H_PP.addr_(H_PP[j].clone(), x_P, alpha=-1)
    return torch.stack(found)


def _inverse(A_NN: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(_cholesky(A_NN))


def _cholesky(A_NN: torch.Tensor) -> torch.Tensor:
    C_NN, failed = torch.linalg.cholesky_ex(A_NN)
    if int(failed):
        raise ValueError(f"the Gram of {len(A_NN)} channels is not positive definite; damp or shrink it")
    return C_NN
