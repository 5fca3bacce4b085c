"""What every stage of a compression computes, from its passes as data, the shapes of its sites and the tokens."""

from collections.abc import Iterator
from typing import NamedTuple

from pared.engine.cost.passes import Passes, Work, compressed
from pared.engine.cost.rates import Rates, beside, total
from pared.engine.cost.sizes import Tokens
from pared.engine.cost.solving import NotDeclaredError, realize, refit, solve
from pared.engine.cost.traced import trace
from pared.engine.spec import LowRankSpec, PassSpec, SparseSpec
from pared.operations import Operation

Stages = dict[str, list[Operation]]

__all__ = ["Stages", "Work", "seconds_of", "stages_of"]


class Part(NamedTuple):
    """A part of a stage.

    Attributes:
        stage: its name in the manifest.
        operations: of it.
        beside: whether it is done beside the part before, where two things can be done at once.
    """

    stage: str
    operations: list[Operation]
    beside: bool = False


def stages_of(work: Work) -> tuple[Stages, list[str]]:
    """Return the operations of every stage, by its name in the manifest, and what is not predicted and why.

    Raises:
        ParedError: the model does not run on shapes alone.
    """
    found: Stages = {}
    unknown: list[str] = []
    for part in _parts(work, unknown):
        found.setdefault(part.stage, []).extend(part.operations)
    return found, unknown


def seconds_of(work: Work, rates: Rates) -> tuple[dict[str, float], list[str]]:
    """Return the seconds of every stage, by its name in the manifest, and what is not predicted and why.

    A stage in which blocks run and are solved beside it takes the time of both; the other what is waited for it.

    Args:
        work: what is done.
        rates: of the machine.

    Raises:
        ParedError: the model does not run on shapes alone.
    """
    found: dict[str, float] = {}
    unknown: list[str] = []
    slowdown, before = rates.slowdown() if work.resident else None, ("", 0.0)
    for part in _parts(work, unknown):
        seconds = total(rates, part.operations)
        if part.beside and slowdown is not None:
            stage, running = before
            whole, seconds = beside(running, seconds, slowdown)
            found[stage] += whole - running
        found[part.stage] = found.get(part.stage, 0.0) + seconds
        before = part.stage, seconds
    return found, unknown


def _parts(work: Work, unknown: list[str]) -> Iterator[Part]:
    """Yield what is computed, stage by stage; what is not known is added to a list."""
    numbers = sum(parameter.numel() for parameter in work.model.parameters())
    once = Operation("stream", (numbers,), work.model_dtype)  # a look at every weight
    size, out = numbers * work.model.dtype.itemsize, work.plan.after.bytes_on_disk
    sparse = isinstance(work.spec, SparseSpec)
    packed = [Operation("pack", (site.out_features, site.in_features)) for site in work.anatomy.sites if sparse]
    yield Part("load", [Operation("read", (size,), "bytes"), *[once] * 3])
    if work.evaluated is not None:
        yield from _perplexity(work, work.evaluated)
    yield Part("probe", [once] * 2)
    passes = None
    if work.tokens is not None:
        passes = Passes(work)
        width = int(work.model.get_input_embeddings().weight.shape[1])
        yield Part(
            "capture", [Operation("stream", (2 * work.tokens.windows * work.tokens.length * width,), work.dtype)]
        )
    for step in work.spec.passes():
        if step.action == "refine":
            unknown.append(
                "refine (a few forward and backward passes an epoch; when a block's training ends is not known)"
            )
            continue
        if passes is not None and step.runs.startswith("backward"):
            yield Part("backward", passes.backward(step))
        if passes is not None and step.runs.endswith("forward"):
            yield Part("walk", passes.forward(step))
        yield from _done(work, step, unknown)
    yield Part("save", [Operation("write", (out,), "bytes"), *[once] * 3, *packed])
    yield Part("verify", [Operation("read", (out,), "bytes"), *[once] * 3, *packed])


def _done(work: Work, step: PassSpec, unknown: list[str]) -> Iterator[Part]:
    """Yield what is done in a step besides what runs."""
    spec = work.spec
    weights = sum(site.out_features * site.in_features for site in work.anatomy.sites)
    if step.action == "allocate":
        if isinstance(spec, LowRankSpec) and spec.tries:
            unknown.append(f"allocate (allocation {spec.allocator.name} tries as many plans as it takes)")
    elif step.action == "evidence":
        if step.runs == "nothing":
            unknown.append(f"spectra (of the weights, for allocation {spec.allocator.name})")
        else:  # a score for every weight, and a histogram of them
            yield Part("allocate", [Operation("stream", (60 * weights,), "float64")])
    elif step.action == "install":
        yield Part("solve", realize(work, from_disk=True))
    elif step.action == "refit":
        yield Part("refit", refit(work))
        if step.reference:  # dense blocks are put together again
            yield Part("walk", [Operation("stream", (4 * weights,), "float32")])
    elif step.action == "quantize":
        unknown.append(f"quantize (rounding to {spec.recipe.quantize} does not declare its operations)")
    else:
        try:
            yield Part("solve", solve(work, step), step.beside)
        except NotDeclaredError:
            unknown.append(f"solve (method {spec.method.name} does not declare its operations)")


def _perplexity(work: Work, evaluated: Tokens) -> Iterator[Part]:
    """Yield the whole model over every window, before and after."""
    found = trace(work.model, work.anatomy, 1, evaluated.length, work.model.dtype)
    loss = Operation("stream", (5 * evaluated.length * work.vocabulary,), "float32")
    before, after = list[Operation](), list[Operation]()
    for index, block in enumerate(found.blocks):
        before += block.forward
        after += compressed(work, index, block.forward)
    for when, blocks in (("before", before), ("after", after)):
        yield Part(f"perplexity {when}", [*found.head.forward, loss, *blocks] * evaluated.windows)
