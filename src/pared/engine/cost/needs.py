"""What a compression needs of memory and disk, computed from shapes before a weight is read.

Estimates from above, of what is large: tensors that are as large as a block, a Gram or the hidden states of a text.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.head import LOGITS
from pared.calibration.statistics import CROSS, Shapes, accumulators
from pared.data.windows import Windows
from pared.engine.spec import CompressionSpec, LowRankSpec
from pared.errors import ParedError
from pared.io.output_dir import RESERVE, free_space
from pared.lowrank.in_place import PANEL
from pared.memory import Available, format_size
from pared.modules.opened import opened_experts
from pared.names import called, option_called
from pared.structure.model import Anatomy, Site
from pared.structure.store import embeddings_and_head

SLACK = 256 * 2**20  # bytes: what libraries take for themselves as they work
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


@dataclass(frozen=True)
class Needs:
    """Bytes that are needed at once, by what for.

    Attributes:
        memory: besides what the process holds already.
        disk: beside the output, until it is written.
        bound: what a streamed compression is to keep to, besides what the process holds already: what is outside of
            the blocks, three blocks, the statistics of one, activation memory and 1 GiB.
    """

    memory: Mapping[str, int]
    disk: Mapping[str, int]
    bound: int = 0

    @property
    def memory_bytes(self) -> int:
        """All memory that is needed."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """All disk that is needed."""
        return sum(self.disk.values())

    def describe(self) -> dict[str, dict[str, int]]:
        """Return it as JSON has it."""
        return {"memory": dict(self.memory), "disk": dict(self.disk)}

    def too_much(self, available: Available | None) -> str:
        """Return what to say where memory does not hold it: what takes how much, and what would take less; or ""."""
        if available is None or self.memory_bytes <= available.bytes:
            return ""
        return (
            f"about {format_size(self.memory_bytes)} of memory needed ({_listed(self.memory)}), "
            f"{format_size(available.bytes)} left by {available.limit}; {self._advice()}"
        )

    def require_disk(self, out: Path, there: int = 0) -> None:
        """Refuse to start what the disk does not hold.

        Args:
            out: the output.
            there: bytes of it that a process which is resumed has written.

        Raises:
            ParedError: says what takes how much and what is free.
        """
        needed = max(self.disk_bytes - there, 0) + RESERVE
        if needed > (free := free_space(out)):
            less = (
                f", or allow more memory for activations ({called('activation_memory')})"
                if "activations" in self.disk
                else ""
            )
            raise ParedError(
                f"not enough disk for {out}: {needed:,} bytes needed ({_listed(self.disk)}), {free:,} free; nothing "
                f"was written: name an output on another disk{less}"
            )

    def _advice(self) -> str:
        largest = max(self.memory, key=self.memory.__getitem__)
        return {
            "the model": f"read it block by block ({called('stream', 'on')})",
            "hidden states": f"allow less for them ({called('activation_memory')}), or calibrate on fewer or shorter "
            f"windows ({called('samples')}, {called('length')})",
            "statistics": "take a method with smaller ones (loss-optimal: "
            f"{option_called('output_weighting', 'diagonal')}; wanda, magnitude or svd need no Gram)",
            "solving": f"leave the widest weights dense ({called('skip')}), or take a method without a Gram (wanda, "
            "magnitude)",
            "a batch in a block": f"calibrate on shorter windows ({called('length')})",
            "the dense blocks beside the compressed": f"read the model block by block ({called('stream', 'on')})",
            "a block to train": f"do without {called('refine')}",
            "logits of a window": f"measure on shorter windows ({called('evaluation.length')})",
        }.get(largest, "use a machine with more")


def needs_of(
    model: PreTrainedModel,
    anatomy: Anatomy,
    spec: CompressionSpec,
    tokens: Tokens | None,
    *,
    streamed: bool,
    itemsize: int,
    output_bytes: int,
    activation_memory: int | None = None,
    evaluated: Tokens | None = None,
) -> Needs:
    """Compute what a compression needs.

    Args:
        model: on the meta device, in the dtype it is loaded in.
        anatomy: of it, with what its sites read.
        spec: of the compression.
        tokens: that are calibrated on; none where nothing is.
        streamed: whether blocks are read one by one.
        itemsize: bytes of a number in what blocks compute in.
        output_bytes: of the compressed weights.
        activation_memory: bytes that hidden states may take in memory; None for no limit.
        evaluated: what perplexity is measured on; none where it is not.
    """
    memory, disk = _weights(model, anatomy, spec, streamed, itemsize if tokens else 0), dict[str, int]()
    spooled = streamed and activation_memory is not None
    memory["statistics"] = statistics = _statistics(anatomy, spec, spooled)
    solving = max((_solving(site, spec) for site in anatomy.sites), default=0)
    if spooled and _on_disk(spec):  # one Gram is read at a time
        disk["statistics"] = statistics
        solving = max(solving + _largest(anatomy, spec) - statistics, 0)
    width, vocabulary = (int(size) for size in reversed(model.get_input_embeddings().weight.shape))
    activations, batch = 0, 0
    if tokens is not None:
        held = tokens.windows * tokens.length * width
        activations = held * itemsize * _sets(spec, _runs(model, anatomy))
        batch = _batch(model, anatomy, tokens, itemsize, spec.backward)
        if spec.refine is not None:  # in float32: what blocks read on both paths, and the graph of a batch
            activations = max(activations, held * SINGLE * 2)
            batch = max(batch, _batch(model, anatomy, replace(tokens, batch=spec.refine.batch), SINGLE, True))
    if evaluated is not None and streamed:
        activations = max(activations, evaluated.windows * evaluated.length * width * model.dtype.itemsize)
    if activations:
        memory["hidden states"] = activations if activation_memory is None else min(activations, activation_memory)
        disk["activations"] = activations - memory["hidden states"]
    logits = 0 if evaluated is None else evaluated.length * vocabulary
    if tokens is not None and spec.backward:
        logits = max(logits, min(tokens.length * vocabulary, max(LOGITS, vocabulary)))
    # Statistics are not there yet, or gone, when there are logits; what is listed does not come at the same time.
    logits = max(logits * (model.dtype.itemsize + 3 * SINGLE) - statistics, 0)
    embeddings = _embeddings(model) if streamed else 0
    around = {"embeddings and head": embeddings, "logits of a window": logits}
    works: list[dict[str, int]] = [{"solving": solving}, {"a batch in a block": batch}, around]
    at_once = max(works, key=lambda work: sum(work.values()))
    memory |= at_once
    memory["libraries"] = SLACK
    if isinstance(spec, LowRankSpec) and any(step.action == "solve" and not step.installs for step in spec.passes()):
        ranked = anatomy.sites if spec.structures != "widths" else ()
        disk["decompositions"] = sum(decomposition_bytes(site, spec, model.dtype.itemsize) for site in ranked)
        disk["orders of channels"] = _orders(anatomy, spec)
    disk["finished blocks"] = _finished(model, anatomy, spec, streamed, output_bytes)
    disk["the output"] = output_bytes
    bound = 0
    if streamed:
        block = max(_bytes(block) for block in anatomy.blocks(model))
        outside = memory["outside of the blocks"] + embeddings
        bound = outside + 3 * block + statistics + memory.get("hidden states", 0) + 2**30
    memory, disk = ({name: size for name, size in parts.items() if size} for parts in (memory, disk))
    return Needs(memory, disk, bound)


def beside_bytes(anatomy: Anatomy, spec: CompressionSpec) -> int:
    """Return what solving a block beside the run of the next one takes more than solving it in turn, in bytes."""
    blocks = {site.block for site in anatomy.sites}
    statistics = max((sum(_accumulators(anatomy, spec, block)) for block in blocks), default=0)
    return statistics + max((_solving(site, spec) for site in anatomy.sites), default=0)


def _weights(
    model: PreTrainedModel, anatomy: Anatomy, spec: CompressionSpec, streamed: bool, itemsize: int
) -> dict[str, int]:
    """Return what weights take, and copies of them to compute with."""
    blocks = anatomy.blocks(model)
    sizes = [_bytes(block) for block in blocks]
    whole = {"the model": _bytes(model)}
    if streamed:
        held = min(spec.group_size, len(blocks)) * max(sizes)
        whole = {"outside of the blocks": _bytes(model) - sum(sizes) - _embeddings(model), "blocks": held}
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


def _finished(
    model: PreTrainedModel, anatomy: Anatomy, spec: CompressionSpec, streamed: bool, output_bytes: int
) -> int:
    """Return what files of finished blocks take beside the output; of a streamed model the last become the output's."""
    outside = _bytes(model) - sum(_bytes(block) for block in anatomy.blocks(model))
    # Each pass that changes blocks writes them; a refit behind refitted blocks removes what it replaces as it goes.
    written = sum(step.changes and not step.replaces for step in spec.passes())
    return max(output_bytes - outside, 0) * (written - streamed)


def _statistics(anatomy: Anatomy, spec: CompressionSpec, spooled: bool) -> int:
    """Return what statistics take: of the blocks that are solved together, and what is kept of all until then."""
    blocks = sorted({site.block for site in anatomy.sites})
    now = max((sum(_accumulators(anatomy, spec, block)) for block in blocks), default=0)
    runs = [step.runs for step in spec.passes() if step.action == "solve"]
    # Gradients wait for the forward pass that collects the rest, and for a second one behind compressed blocks.
    kept = not spooled and ("backward, then forward" in runs or (spec.gradients and len(runs) > 1))
    waiting = sum(sum(_sizes(anatomy, block, lambda _: spec.gradients)) for block in blocks) if kept else 0
    return min(spec.group_size, len(blocks)) * now + waiting


def _on_disk(spec: CompressionSpec) -> bool:
    """Whether the statistics of a block are written before it is solved, if anything waits on the disk."""
    return isinstance(spec, LowRankSpec) and any(step.runs == "backward" for step in spec.passes())


def _largest(anatomy: Anatomy, spec: CompressionSpec) -> int:
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


def _runs(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """Return how often blocks run in one pass: some models run the same ones several times."""
    told = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return max(len(anatomy.blocks(model)), told if isinstance(told, int) else 0)


def _sets(spec: CompressionSpec, runs: int) -> int:
    """Return how many times the hidden states of the text are held at once."""
    forward = 1
    if any(step.hand_on == "compressed" for step in spec.passes()):
        forward += max(spec.group_size, 1)
    forward += _has_reference(spec)
    backward = runs + 2 if spec.backward or "losses" in spec.allocator.requires else 0  # what every block reads
    return max(forward, backward)


def decomposition_bytes(site: Site, spec: LowRankSpec, itemsize: int) -> int:
    """Return the bytes that a decomposition takes on the disk until its rank is known."""
    out, width = site.out_features, site.in_features
    directions = out * out * SINGLE if out <= width else width * width * DOUBLE
    whole = out * min(out, width) if "output_gradient_full" in spec.gradients else out
    weighting = whole * DOUBLE if spec.gradients else 0
    return directions + weighting + (out * width * itemsize if spec.refit != "off" or spec.elastic else 0)


def _orders(anatomy: Anatomy, spec: LowRankSpec) -> int:
    """Return the bytes that orders of channels take on the disk: of every site that might be one to read them."""
    if not spec.ordered_by_gram:
        return 0
    readers = Counter(site.reads for site in anatomy.sites)
    return sum(site.in_features**2 * SINGLE for site in anatomy.sites if readers[site.reads] == 1)


def _batch(model: nn.Module, anatomy: Anatomy, tokens: Tokens, itemsize: int, gradients: bool) -> int:
    """Return what a block makes of one batch on its way: outputs of its widest layers; with gradients, of all.

    Experts make something of the tokens that they are given.
    """
    shares = {
        f"{name}.{number}": one.picked / one.count
        for name, one in opened_experts(model).items()
        for number in range(one.count)
    }
    blocks = {site.block for site in anatomy.sites}
    sizes = [[(s.out_features + s.in_features) * shares.get(s.parent, 1) for s in anatomy.sites_of(b)] for b in blocks]
    widest = max(sum(own) if gradients else max(own) for own in sizes)
    return math.ceil(tokens.batch * tokens.length * itemsize * 3 * widest)


def _embeddings(model: PreTrainedModel) -> int:
    """Return the bytes of what a streamed model gives up while its blocks run."""
    return sum(weight.numel() * weight.dtype.itemsize for weight in embeddings_and_head(model))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())


def _listed(parts: Mapping[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {format_size(size)}" for name, size in ordered)
