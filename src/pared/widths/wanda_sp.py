"""Wanda's score for whole channels, as FLAP's authors have it beside theirs (Wanda-sp, arXiv 2312.11983).

``S_j = mean_o |W_oj| · ‖x_j‖₂`` (Wanda: Sun et al., ICLR 2024, arXiv 2306.11695); a head has the sum over its inputs.
Nothing makes up for what goes.
"""

import torch

from pared.widths.removal import Channels, in_order_of


def order_channels(W_ON: torch.Tensor, energy_N: torch.Tensor, inputs: int = 1) -> Channels:
    """Order the channels that a weight reads by the size of their weights and of their inputs.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype.
        energy_N: ``E[x²]`` of its inputs ``(in,)``; a common factor changes nothing.
        inputs: of the weight that one channel has, side by side.

    Raises:
        ValueError: an energy is negative or not finite.
    """
    if not bool((energy_N.isfinite() & (energy_N >= 0)).all()):
        raise ValueError("the energy of what it reads is negative or not finite")
    return in_order_of(W_ON.double().abs().mean(dim=0) * energy_N.double().sqrt(), W_ON, inputs)
