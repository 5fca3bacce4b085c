"""FLAP: channels whose inputs fluctuate least go, their mean stays as a bias (An et al., AAAI 2024, arXiv 2312.11983).

Channel j of what W reads is worth ``S_j = Var[x_j] ‖W_:j‖²``, the squared error of the output if ``x_j`` is replaced
by its mean (the weighted input feature variance). That mean goes into the bias, ``b' = b + Σ_{j in R} W_:j E[x_j]``, so
that the mean output is what it was. A head has the sum over its inputs. Scores of different layers are compared once
they are standardised, by the allocation ``global``.
"""

from dataclasses import replace

import torch

from pared.widths.removal import Channels, in_order_of


def order_channels(W_ON: torch.Tensor, variance_N: torch.Tensor, mean_N: torch.Tensor, inputs: int = 1) -> Channels:
    """Order the channels that a weight reads by their weighted fluctuation.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype.
        variance_N: ``Var[x]`` of its inputs over tokens ``(in,)``.
        mean_N: ``E[x]`` of its inputs ``(in,)``.
        inputs: of the weight that one channel has, side by side.

    Raises:
        ValueError: a variance or a mean is not finite.
    """
    if not bool((variance_N.isfinite() & mean_N.isfinite()).all()):
        raise ValueError("a mean or a variance of what it reads is not finite")
    scores_N = variance_N.double() * W_ON.double().square().sum(dim=0)
    return replace(in_order_of(scores_N, W_ON, inputs), mean_N=mean_N.double())
