"""How much the norm behind a block makes of every feature of what the block outputs.

An error of a hidden state is seen by the next block through its norm: what that multiplies by a large number matters.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.activations import BlockInputs, replaced_output
from pared.calibration.forward import cast_block
from pared.structure.model import Anatomy
from pared.structure.probe import hooks, run_model
from pared.structure.state import KeptState
from pared.structure.store import DenseBlocks

PROBE_TOKENS = 8


def gains_of_next(
    model: PreTrainedModel, anatomy: Anatomy, inputs: BlockInputs, dense: DenseBlocks
) -> list[torch.Tensor]:
    """Return for every block how much what follows weights the features of its output, ``(width,)`` in float32.

    The norms are found by structure: whatever has weights for single features alone, outputs what it reads in shape,
    and reads the very hidden states that the next block reads, or, of the last block, that the model's own code is
    given. Several of them add up in squares. Where there is none, as where blocks end with a norm, all weights are 1.

    Args:
        model: its code around the blocks is run on a few tokens.
        anatomy: after the probe pass.
        inputs: of the first block; one batch of them says how blocks are called.
        dense: hands out the blocks.
    """
    gains = []
    for index in range(1, len(anatomy.blocks(model))):
        block = cast_block(dense(index), inputs.dtype, inputs.device)
        call, hidden = inputs.calls_of(0, index)[0], inputs.hidden[0].clone()
        found = _Norms(hidden)
        state = KeptState([block])
        with torch.no_grad(), hooks(found.hooked(block)):
            call.run(block, hidden)
        state.restore()
        gains.append(found.gain())
    return [*gains, _behind_the_last(model, anatomy, inputs)]


def _behind_the_last(model: PreTrainedModel, anatomy: Anatomy, inputs: BlockInputs) -> torch.Tensor:
    """Return what the model's own code behind the last block weights features with."""
    calls, blocks = inputs.calls[0], anatomy.blocks(model)
    embedded = model.get_input_embeddings().weight
    hidden = torch.ones(1, PROBE_TOKENS, inputs.hidden.shapes[0][-1], dtype=model.dtype, device=embedded.device)
    found = _Norms(hidden)
    tokens = torch.arange(PROBE_TOKENS).remainder(embedded.shape[0]).unsqueeze(0)
    with replaced_output(blocks, calls, lambda _: hidden, anatomy.block_name), hooks(found.hooked(model)):
        run_model(model, tokens)
    return found.gain().to(inputs.device)


class _Norms:
    """The norms that read certain hidden states.

    Args:
        hidden: ``(batch, tokens, width)``.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden
        self._gains: dict[int, torch.Tensor] = {}  # by the identity of the module

    def hooked(self, root: nn.Module) -> Iterator[Any]:
        """Watch every module whose parameters are all of single features."""
        width = self._hidden.shape[-1]
        for module in root.modules():
            shapes = [tuple(parameter.shape) for parameter in module.parameters()]
            if shapes and all(shape == (width,) for shape in shapes):
                yield module.register_forward_hook(self._note)

    def gain(self) -> torch.Tensor:
        """Return the weights of features; ones if nothing was found."""
        if not self._gains:
            return torch.ones(self._hidden.shape[-1], device=self._hidden.device)
        return torch.stack(list(self._gains.values())).square().sum(0).sqrt()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reads = bool(args) and args[0] is self._hidden
        if reads and isinstance(output, torch.Tensor) and output.shape == self._hidden.shape:
            self._gains.setdefault(id(module), _gain(module, self._hidden))


def _gain(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return how much a norm multiplies every feature of a token of unit size by, whatever its formula is."""
    signs = hidden.new_ones(1, 1, hidden.shape[-1])
    signs[..., 1::2] = -1  # of mean 0, which some norms take off, and mean square 1
    return ((module.forward(signs) - module.forward(-signs)) / 2).abs().flatten().float().detach()
