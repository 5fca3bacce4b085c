"""What a compression needs of memory and disk, computed from shapes before a weight is read, and what to say of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from pared.calibration.head import LOGITS
from pared.engine.cost.sizes import (
    SINGLE,
    Tokens,
    batch_bytes,
    decomposition_bytes,
    embedding_bytes,
    finished_bytes,
    hidden_sets,
    is_set_aside,
    largest_statistic,
    module_bytes,
    order_bytes,
    runs_of,
    solving_bytes,
    statistic_bytes,
    weight_bytes,
)
from pared.engine.spec import CompressionSpec, LowRankSpec
from pared.errors import ParedError
from pared.io.output_dir import RESERVE, free_space
from pared.memory import Available, format_size
from pared.names import called, option_called
from pared.structure.model import Anatomy

SLACK = 256 * 2**20  # bytes: what libraries take for themselves as they work


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
    memory, disk = weight_bytes(model, anatomy, spec, streamed, itemsize if tokens else 0), dict[str, int]()
    spooled = streamed and activation_memory is not None
    memory["statistics"] = statistics = statistic_bytes(anatomy, spec, spooled)
    solving = solving_bytes(anatomy, spec)
    if spooled and is_set_aside(spec):  # one Gram is read at a time
        disk["statistics"] = statistics
        solving = max(solving + largest_statistic(anatomy, spec) - statistics, 0)
    width, vocabulary = (int(size) for size in reversed(model.get_input_embeddings().weight.shape))
    activations, batch = 0, 0
    if tokens is not None:
        held = tokens.windows * tokens.length * width
        activations = held * itemsize * hidden_sets(spec, runs_of(model, anatomy))
        draws = spec.labels_per_token if spec.gradients else 1  # of what experts add up nothing of a site is held
        batch = batch_bytes(model, anatomy, tokens, itemsize, spec.backward, draws)
        if spec.refine is not None:  # in float32: what blocks read on both paths, and the graph of a batch
            activations = max(activations, held * SINGLE * 2)
            batch = max(batch, batch_bytes(model, anatomy, replace(tokens, batch=spec.refine.batch), SINGLE, True))
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
    embeddings = embedding_bytes(model) if streamed else 0
    around = {"embeddings and head": embeddings, "logits of a window": logits}
    works: list[dict[str, int]] = [{"solving": solving}, {"a batch in a block": batch}, around]
    at_once = max(works, key=lambda work: sum(work.values()))
    memory |= at_once
    memory["libraries"] = SLACK
    if isinstance(spec, LowRankSpec) and any(step.action == "solve" and not step.installs for step in spec.passes()):
        ranked = anatomy.sites if spec.structures != "widths" else ()
        disk["decompositions"] = sum(decomposition_bytes(site, spec, model.dtype.itemsize) for site in ranked)
        disk["orders of channels"] = order_bytes(anatomy, spec)
    disk["finished blocks"] = finished_bytes(model, anatomy, spec, streamed, output_bytes)
    disk["the output"] = output_bytes
    bound = 0
    if streamed:
        block = max(module_bytes(block) for block in anatomy.blocks(model))
        outside = memory["outside of the blocks"] + embeddings
        bound = outside + 3 * block + statistics + memory.get("hidden states", 0) + 2**30
    memory, disk = ({name: size for name, size in parts.items() if size} for parts in (memory, disk))
    return Needs(memory, disk, bound)


def _listed(parts: Mapping[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {format_size(size)}" for name, size in ordered)
