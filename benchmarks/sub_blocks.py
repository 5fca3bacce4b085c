"""Whether blocks are better refined whole, or attention and MLP each towards what the dense one's output.

    PARED_DATA=/path/to/data python benchmarks/sub_blocks.py                 # one way after the other
    python benchmarks/sub_blocks.py --render                                 # renders the page only

Reconstruction of parts of a block, each across its own non-linearity, is what arXiv 2510.14444 recommends after
pruning. No gradient goes from one part into another. Whichever way, what is kept is what makes the block's output
better on what is held out. One JSON line a way; one that is there is not measured again.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

import pared
from grid import LENGTH, WINDOWS, measured, ratios, signature
from low_rank import statistics
from pared.calibration import saved_blocks
from pared.engine import refine
from pared.schema.manifest import Refined
from pared.structure import find_anatomy
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "sub_blocks.jsonl", RESULTS / "sub_blocks.md"
MODEL, KEEP = "embedded:smollm2-135m", 0.6
WHOLE = "the block"
WAYS = {
    WHOLE: "every parameter by the block's output, two epochs",
    "its parts": "attention by the attention's output, the MLP by the MLP's, two epochs",
    "its parts, corrected": "the same, the attention's target making up for what the residual stream is off by",
    "its parts, then the block": "one epoch each",
}
Outputs = dict[str, torch.Tensor]


def of_output(output: Any) -> torch.Tensor:
    """Return the hidden states of what a module outputs."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def seen(block: nn.Module, parts: tuple[str, ...]) -> Iterator[Outputs]:
    """Keep what parts of a block output, and let no gradient through to them from what comes after."""
    found: Outputs = {}

    def keep(_: nn.Module, __: Any, output: Any, part: str) -> Any:
        found[part] = of_output(output)
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    hooks = [block.get_submodule(part).register_forward_hook(partial(keep, part=part)) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class PartTraining(refine.BlockTraining):
    """The training of one block by what its parts output."""

    way = WHOLE
    dense: nn.ModuleList
    parts: tuple[str, ...]
    read: list[torch.Tensor] | None = None  # what the dense block of this index reads

    def __init__(self, block: nn.Module, trained: list[str], index: int, inputs: Any, targets: Any, *more: Any) -> None:
        super().__init__(block, trained, index, inputs, targets, *more)
        self._by_parts = False
        read = type(self).read if index else None
        read = [hidden.clone() for hidden in inputs.hidden] if read is None else read
        dense = refine.copy_block(type(self).dense[index]).to(dtype=inputs.dtype)
        self._wanted = [self._dense_outputs(dense, number, hidden) for number, hidden in enumerate(read)]
        type(self).read = [target.clone() for target in targets]

    @torch.no_grad()
    def _dense_outputs(self, block: nn.Module, number: int, hidden: torch.Tensor) -> Outputs:
        with seen(block, self.parts) as found:
            for call in self._inputs.calls_of(number, self._index):
                call.run(block, hidden.clone())
        first = self.parts[0]
        if "corrected" in self.way:
            found[first] = found[first] + hidden - self._inputs.hidden[number]
        return {part: output.clone() for part, output in found.items()}

    def _loss(self, number: int) -> torch.Tensor:
        if not self._by_parts or not torch.is_grad_enabled():  # what is held out is measured by the block
            return super()._loss(number)
        with seen(self._worker, self.parts) as found:
            self._output(number)
        wanted = self._wanted[number].items()
        alike = torch.ones_like(self._weights)
        return torch.stack([refine.relative_error(found[part], one, alike).mean() for part, one in wanted]).sum()

    def run(self, name: str) -> tuple[refine.State, Refined]:
        """Train as the way says."""
        if self.way == WHOLE:
            return super().run(name)
        whole, self._by_parts = self._config, True
        if not self.way.endswith("then the block"):
            return super().run(name)
        self._config = whole.model_copy(update={"epochs": 1})
        first, one = super().run(name)
        with torch.no_grad():
            for own, values in first.items():  # where a lower rate begins again, too
                self._parameters[own].copy_(values)
                refine.replace_parameter(self._block, own, values)
        self._by_parts = False
        second, other = super().run(name)
        return second or first, Refined(name=name, before=one.before, after=min(one.after, other.after),
                                        epochs=one.epochs + other.epochs)  # fmt: skip


def measure(way: str, samples: int) -> None:
    """Compress and refine one way, and write the line."""
    calibration = pared.Calibration(text="wikitext2:train", samples=samples, length=LENGTH)
    recipe = pared.Recipe.model_validate(
        {"keep": KEEP, "statistics": "once", "calibration": calibration, "evaluation": None, "refine": {}}
    )
    folder = statistics(MODEL, "loss-optimal", calibration)
    model, tokenizer, dense = pared.load(MODEL), pared.load_tokenizer(MODEL), pared.load(MODEL)
    anatomy = find_anatomy(dense)
    parts = dict.fromkeys(anatomy.path_in_block(site).split(".")[0] for site in anatomy.sites_of(0))
    PartTraining.way, PartTraining.dense, PartTraining.parts = way, anatomy.blocks(dense), tuple(parts)
    refine.BlockTraining = PartTraining  # type: ignore[misc]
    start = time.process_time()
    result = pared.compress(model, tokenizer, recipe, collected=lambda: saved_blocks(folder))
    seconds = time.process_time() - start
    gained = [one.after / one.before for one in result.refined if one.before > 0]
    append(LINES, {"model": MODEL, "keep": KEEP, "way": way, "samples": samples, "processor_seconds": seconds,
                   "error_after": sum(gained) / len(gained), **measured(model, tokenizer)})  # fmt: skip


def render() -> str:
    """Return the page."""
    lines, others = read(LINES), read(RESULTS / "structures.jsonl")
    dense = next(line for line in others if line["structures"] == "dense" and line["model"] == MODEL)
    rows = [(line["way"], f"{line['samples']} x {LENGTH}", f"{line['error_after']:.3f}", *ratios(line, dense))
            for line in lines]  # fmt: skip
    return "\n".join([
        "# Refined whole, or in parts",
        "",
        "Made by `python benchmarks/sub_blocks.py`; raw figures in [sub_blocks.jsonl](sub_blocks.jsonl). Do not edit.",
        "",
        f"`{MODEL}`, `loss-optimal`, mixed, keep {KEEP:g}, statistics of wikitext2:train collected once, refined on "
        f"the same windows; perplexity on {WINDOWS} windows of {LENGTH} tokens, and its multiple of the dense model's. "
        "*error* is what is left of a block's error on what is held out, the mean over blocks.",
        "",
        *(f"- *{way}*: {told}." for way, told in WAYS.items()),
        "",
        table(("trained by", "tokens", "error", *dense["perplexity"]), rows),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--samples", type=int, default=8, help="windows that are calibrated and trained on")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    for way in () if asked.render else asked.ways:
        if not any((line["way"], line["samples"]) == (way, asked.samples) for line in read(LINES)):
            measure(way, asked.samples)
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
