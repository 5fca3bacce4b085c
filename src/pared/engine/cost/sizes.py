"""What weights, statistics, solving and hidden states take of memory and disk, in bytes, from shapes.

Estimates from above, of what is large: tensors that are as large as a block, a Gram or the hidden states of a text.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.statistics import CROSS, Shapes, accumulators
from pared.data.windows import Windows
from pared.engine.spec import CompressionSpec, LowRankSpec
from pared.lowrank.in_place import PANEL
from pared.modules.opened import opened_experts
from pared.structure.model import Anatomy, Site
from pared.structure.store import embeddings_and_head

SINGLE, DOUBLE = 4, 8  # bytes of a number


@dataclass(frozen=True)
class Tokens:
    """How much text the blocks run on.

    Attributes:
        windows: of it.
        length: tokens of each.
        batch: windows in one forward pass.
    """

    windows: int
    length: int
    batch: int

    @classmethod
    def of(cls, windows: Windows | None, batch: int) -> "Tokens | None":
        """Count those of a text that was read; None where there is none."""
        return None if windows is None else cls(len(windows.tokens), windows.tokens.shape[1], batch)


def beside_bytes(anatomy: Anatomy, spec: CompressionSpec) -> int:
    """Return what solving a block beside the run of the next one takes more than solving it in turn, in bytes."""
    return _of_one_block(anatomy, spec) + solving_bytes(anatomy, spec)


def _of_one_block(anatomy: Anatomy, spec: CompressionSpec) -> int:
    """Return what the statistics of the block with the most take."""
    blocks = {site.block for site in anatomy.sites}
    return max((sum(_accumulators(anatomy, spec, block)) for block in blocks), default=0)


def weight_bytes(
    model: PreTrainedModel, anatomy: Anatomy, spec: CompressionSpec, streamed: bool, itemsize: int
) -> dict[str, int]:
    """Return what weights take, and copies of them to compute with."""
    blocks = anatomy.blocks(model)
    sizes = [module_bytes(block) for block in blocks]
    whole = {"the model": module_bytes(model)}
    if streamed:
        held = min(spec.group_size, len(blocks)) * max(sizes)
        whole = {"outside of the blocks": module_bytes(model) - sum(sizes) - embedding_bytes(model), "blocks": held}
    copied = max(sizes) // model.dtype.itemsize * itemsize
    return whole | {
        "a block to compute with": copied if itemsize != model.dtype.itemsize else 0,
        "a block of the dense model": copied if _has_reference(spec) else 0,
        **_to_train(spec, sum(sizes), max(sizes) // model.dtype.itemsize * SINGLE, streamed),
    }


def _to_train(spec: CompressionSpec, blocks: int, largest: int, streamed: bool) -> dict[str, int]:
    """Return what training blocks takes: the dense ones, where none can be read again, and one block several times."""
    if spec.refine is None:
        return {}
    dense = {} if streamed else {"the dense blocks beside the compressed": blocks}
    # A copy to train, gradients, what Adam keeps (two of each), the best so far, and the dense block in float32.
    return dense | {"a block to train": 6 * largest}


def _has_reference(spec: CompressionSpec) -> bool:
    """Whether the dense model runs alongside the compressed one in any pass."""
    return any(step.reference for step in spec.passes())


def finished_bytes(
    model: PreTrainedModel, anatomy: Anatomy, spec: CompressionSpec, streamed: bool, output_bytes: int
) -> int:
    """Return what files of finished blocks take beside the output; of a streamed model the last become the output's."""
    outside = module_bytes(model) - sum(module_bytes(block) for block in anatomy.blocks(model))
    # Each pass that changes blocks writes them; a refit behind refitted blocks removes what it replaces as it goes.
    written = sum(step.changes and not step.replaces for step in spec.passes())
    return max(output_bytes - outside, 0) * (written - streamed)


def statistic_bytes(anatomy: Anatomy, spec: CompressionSpec, spooled: bool) -> int:
    """Return what statistics take: of the blocks that are solved together, and what is kept of all until then."""
    blocks = sorted({site.block for site in anatomy.sites})
    runs = [step.runs for step in spec.passes() if step.action == "solve"]
    # Gradients wait for the forward pass that collects the rest, and for a second one behind compressed blocks.
    kept = not spooled and ("backward, then forward" in runs or (spec.gradients and len(runs) > 1))
    waiting = sum(sum(_sizes(anatomy, block, lambda _: spec.gradients)) for block in blocks) if kept else 0
    return min(spec.group_size, len(blocks)) * _of_one_block(anatomy, spec) + waiting


def is_set_aside(spec: CompressionSpec) -> bool:
    """Whether the statistics of a block are written before it is solved, if anything waits on the disk."""
    return isinstance(spec, LowRankSpec) and any(step.runs == "backward" for step in spec.passes())


def largest_statistic(anatomy: Anatomy, spec: CompressionSpec) -> int:
    """Return the bytes of the largest statistic of any site."""
    return max(max(_accumulators(anatomy, spec, block), default=0) for block in {s.block for s in anatomy.sites})


def _accumulators(anatomy: Anatomy, spec: CompressionSpec, block: int) -> list[int]:
    """Return the bytes of everything that is collected of a block at once."""
    crossed = isinstance(spec, LowRankSpec) and spec.reference
    refit = isinstance(spec, LowRankSpec) and spec.refit != "off"

    def needs(shapes: Shapes) -> frozenset[str]:
        found = spec.requires(shapes) | spec.gradients | ({"mean_gram"} if refit else frozenset())
        found |= {"gram"} if spec.rounds_by_inputs else frozenset()
        found |= {"energy"} if spec.allocator.requires & {"scores", "losses"} else frozenset()
        return found | ({CROSS, "gram"} if crossed else frozenset())

    return _sizes(anatomy, block, needs)


def _sizes(anatomy: Anatomy, block: int, needs: Callable[[Shapes], frozenset[str]]) -> list[int]:
    made = accumulators(anatomy.sites_of(block), needs, torch.device("meta"))
    tensors = {id(t): t for own in made.values() for one in own.values() for t in one.state_dict().values()}
    return [tensor.nbytes for tensor in tensors.values()]


def solving_bytes(anatomy: Anatomy, spec: CompressionSpec) -> int:
    """Return what solving for the weight that needs most takes."""
    return max((_solving(site, spec) for site in anatomy.sites), default=0)


def _solving(site: Site, spec: CompressionSpec) -> int:
    """Return what solving for a weight takes: its products in float64, and an eigenproblem or an inverse."""
    out, width = site.out_features, site.in_features
    if not isinstance(spec, LowRankSpec):
        inverse = 3 * width**2 * DOUBLE if spec.walked and "gram" in spec.requires([(out, width)]) else 0
        return inverse + 4 * out * width * SINGLE
    whole, less = "output_gradient_full" in spec.gradients, min(out, width)
    ordering = 3 * width**2 if spec.ordered_by_gram else 0  # its inverse twice, and the factor of the Gram in order
    if spec.method.input_gram == "mean_gram":
        # The square of one Gram, which is worked in or multiplied with as it is, and what is as narrow as the weight.
        squares = max(out if whole else 0, width) ** 2 + (8 if whole else 6) * less**2
        if any(amount != 0 for amount in spec.shrinkage.values()):
            squares += max(out if whole else 0, width) ** 2
        return DOUBLE * (ordering + squares + 3 * out * width + max(out, width) * PANEL)
    squares = out * width if spec.method.solve is None else 3 * width**2 + 6 * less**2
    return DOUBLE * (ordering + 2 * out * width + squares)


def runs_of(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """Return how often blocks run in one pass: some models run the same ones several times."""
    told = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return max(len(anatomy.blocks(model)), told if isinstance(told, int) else 0)


def hidden_sets(spec: CompressionSpec, runs: int) -> int:
    """Return how many times the hidden states of the text are held at once."""
    forward = 1
    if any(step.hand_on == "compressed" for step in spec.passes()):
        forward += max(spec.group_size, 1)
    forward += _has_reference(spec)
    # What every block reads, what the last one outputs, and its gradients.
    backward = runs + 1 + spec.labels_per_token if spec.backward or "losses" in spec.allocator.requires else 0
    return max(forward, backward)


def decomposition_bytes(site: Site, spec: LowRankSpec, itemsize: int) -> int:
    """Return the bytes that a decomposition takes on the disk until its rank is known."""
    out, width = site.out_features, site.in_features
    directions = out * out * SINGLE if out <= width else width * width * DOUBLE
    whole = out * min(out, width) if "output_gradient_full" in spec.gradients else out
    weighting = whole * DOUBLE if spec.gradients else 0
    return directions + weighting + (out * width * itemsize if spec.refit != "off" or spec.elastic else 0)


def order_bytes(anatomy: Anatomy, spec: LowRankSpec) -> int:
    """Return the bytes that orders of channels take on the disk: of every site that might be one to read them."""
    if not spec.ordered_by_gram:
        return 0
    readers = Counter(site.reads for site in anatomy.sites)
    return sum(site.in_features**2 * SINGLE for site in anatomy.sites if readers[site.reads] == 1)


def batch_bytes(
    model: nn.Module, anatomy: Anatomy, tokens: Tokens, itemsize: int, gradients: bool, draws: int = 1
) -> int:
    """Return what a block makes of one batch on its way: outputs of its widest layers; with gradients, of all.

    Of several draws of labels the gradients of what all sites output are held until the last has come by, and again
    side by side. Experts make something of the tokens that they are given.
    """
    shares = {
        f"{name}.{number}": one.picked / one.count
        for name, one in opened_experts(model).items()
        for number in range(one.count)
    }
    blocks = {site.block for site in anatomy.sites}
    sizes = [[(s.out_features + s.in_features) * shares.get(s.parent, 1) for s in anatomy.sites_of(b)] for b in blocks]
    widest = max(sum(own) if gradients else max(own) for own in sizes)
    drawn = max(sum(s.out_features * shares.get(s.parent, 1) for s in anatomy.sites_of(b)) for b in blocks)
    return math.ceil(tokens.batch * tokens.length * itemsize * (3 * widest + 2 * drawn * (draws - 1)))


def embedding_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of what a streamed model gives up while its blocks run."""
    return sum(weight.numel() * weight.dtype.itemsize for weight in embeddings_and_head(model))


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())
