"""Ranks of what is left of layers that lose channels: what they are expected to lose, and their factors."""

from collections.abc import Mapping, Sequence

import torch

from pared.engine.ranks.decompose import decompose
from pared.engine.spec import LowRankSpec
from pared.lowrank import Factors
from pared.structure.groups import ChannelGroup
from pared.widths import Maker


def composes(spec: LowRankSpec, group: ChannelGroup) -> bool:
    """Whether what is left of the layers of a group may have a rank."""
    fused = any(one.parts > 1 for one in group.producers)  # whose halves would have to share a rank's directions
    plain = group.unit == "channel" and group.inputs == 1 and not fused
    return plain and spec.structures == "mixed" and not spec.method.shifts


def energies(spec: LowRankSpec, makers: Sequence[Maker]) -> torch.Tensor:
    """Return the energy that every channel has in the layers that make it, weighted as the method weighs them.

    Of an output with gradient g and row w that is ``E[g²] w A wᵀ``: by how much the energy of a layer falls as channels
    go, so does what a rank of the rest of it discards.

    Returns:
        ``(layers, channels)``, float64.
    """
    rows = []
    for one in makers:
        A_NN = one.statistics[spec.method.input_gram].double()
        W_ON = one.W_ON.to(A_NN)
        energy_O = ((W_ON @ A_NN) * W_ON).sum(dim=1)
        names = spec.gradients & one.statistics.keys()
        gradient = one.statistics[min(names)] if names else A_NN.new_ones(())
        energy_O = energy_O * (gradient.diagonal() if gradient.ndim == 2 else gradient)
        rows.append(energy_O[one.rows_GR].sum(dim=1))
    return torch.stack(rows)


def rest(
    spec: LowRankSpec,
    name: str,
    W_ON: torch.Tensor,
    values: Mapping[str, torch.Tensor],
    rank: int,
    *,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
) -> Factors:
    """Return the factors of what is left of a layer.

    Args:
        spec: how it is decomposed.
        name: of the layer.
        W_ON: the weight that is left.
        values: the statistics of the whole layer.
        rank: of the factors.
        inputs: which of the layer's inputs are left, if not all.
        outputs: which of its outputs.

    Raises:
        ParedError: its statistics do not allow it; names the layer.
    """

    def left(kind: str, value: torch.Tensor) -> torch.Tensor:
        places = inputs if kind == spec.method.input_gram else outputs
        if places is None or not value.ndim:
            return value
        return value[places] if value.ndim == 1 else value[places][:, places]

    own = {kind: left(kind, value) for kind, value in values.items()}
    return decompose(spec, name, [W_ON], [own]).factors(rank)
