"""Statistics for one recipe: of a walk, of a backward pass, or from a folder."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import (
    GRADIENT_STATISTICS,
    STATISTICS,
    BlockInputs,
    Collected,
    DensePath,
    Shapes,
    WalkedBlock,
    backward,
    capture,
    choose_labels,
    gradient_accumulators,
    require_statistics,
    save_blocks,
    share_felt,
    walk,
)
from pared.data.windows import Windows, require_fits
from pared.engine.spec import anatomy_of, dense_path_of, low_rank_of, method_of, options_of, statistics_of
from pared.engine.windows import calibration_windows
from pared.environment import choose_dtype, device_of
from pared.errors import ParedError
from pared.lowrank import METHODS, LowRankMethod
from pared.lowrank.registry import nothing
from pared.models.architecture import is_causal
from pared.progress import Progress, Silent, Stopwatch
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, probe
from pared.structure.probe import BlockCall

Loss = Literal["sampled", "labels"]
Needs = Callable[[Shapes], frozenset[str]]  # names of statistics, from the shapes of sites that read one tensor
Felt = Mapping[str, Mapping[str, Collected]]  # what the loss feels, by site and statistic


@dataclass
class Passes:
    """What goes over the blocks for one recipe.

    Attributes:
        model: as it is when a pass runs: dense, or compressed up to some block.
        tokenizer: of the model.
        recipe: whose method and calibration are read.
        progress: who watches.
        collected: saved statistics, in place of the first pass.
        watch: seconds by stage.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    progress: Progress
    collected: Callable[[], Iterator[WalkedBlock]] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.felt: Felt = {}
        self.tokens = 0  # of the text, padding aside, once it is captured
        self.felt_tokens = 0  # of those, the ones that went through a backward pass

    @cached_property
    def method(self) -> LowRankMethod:
        """What asks for statistics."""
        return low_rank_of(self.recipe)

    @cached_property
    def options(self) -> dict[str, object]:
        """Of the method."""
        return options_of(self.recipe)

    @property
    def loss(self) -> Loss:
        """How the labels of a backward pass are chosen."""
        return "labels" if self.options["loss"] == "labels" else "sampled"

    @property
    def group(self) -> int:
        """How many neighbouring blocks are compressed together."""
        size = method_of(self.recipe).options.get("group_size", 1)
        return int(self.recipe.options.get("group_size", size))

    @property
    def dense_path(self) -> float:
        """The share of the dense model's outputs in targets."""
        return dense_path_of(self.recipe)

    @property
    def gradient_share(self) -> float:
        """The share of the windows that go through the backward pass."""
        return share_felt(self.method.gradients(self.options))

    @property
    def again(self) -> bool:
        """Whether statistics are collected behind the compressed prefix; a method without any has none to collect."""
        return statistics_of(self.recipe) == "sequential" and self.method.walked

    def windows(self) -> Windows:
        """Cut what is calibrated on."""
        causal = is_causal([type(self.model).__name__])
        return calibration_windows(self.recipe, self.tokenizer, self.model.config, causal)

    def capture(self, anatomy: Anatomy, calls: list[BlockCall], windows: Windows) -> BlockInputs:
        """Get the input of the first block and the calls of all."""
        asked = self.recipe.calibration
        self.tokens = windows.real_tokens
        with self.watch("capture"):
            device = device_of(self.recipe.device)
            dtype = choose_dtype(asked.dtype, self.model.dtype, device)
            return capture(self.model, anatomy, windows.tokens, asked.batch, calls, dtype, device, windows.beside)

    def beside(self, inputs: BlockInputs, block: Callable[[int], nn.Module]) -> DensePath | None:
        """Return the dense path on these inputs, if it has a share in the targets."""
        return DensePath([hidden.clone() for hidden in inputs.hidden], block) if self.dense_path else None

    def statistics(
        self,
        anatomy: Anatomy,
        inputs: BlockInputs | None,
        windows: Windows | None,
        behind: bool = False,
        influence: bool = False,
    ) -> Iterator[WalkedBlock]:
        """Yield every block with the statistics of its sites: of a walk, of a backward pass, or of nothing at all.

        Args:
            anatomy: after the probe pass.
            inputs: what the first block reads; none if nothing is done on text.
            windows: the tokens.
            behind: let every block read what the caller made of those before it.
            influence: measure how much every block changes the hidden states.
        """
        names = self.method.gradients(self.options)
        walked = behind or not names or (self.gradient_share < 1 and self.collected is None)
        if inputs is None or windows is None or not (names or self.method.walked or influence):
            yield from self.without_data(anatomy)
            return
        if self.collected is not None and not behind:
            for saved in self.collected():
                yield saved
                if self.again:
                    self.felt = {**self.felt, **_only(saved.statistics, names)}
            return
        if names and not self.felt:
            if self.collected is not None:
                self.felt = {k: v for saved in self.collected() for k, v in _only(saved.statistics, names).items()}
            else:  # what sites read is collected on the way, unless it will be in a walk
                read = frozenset() if walked else self.method.needs([(1, 1)])
                self.felt = self.feel(anatomy, inputs, windows, names | read, self.loss, self.gradient_share)
        needs = self.method.needs if walked else nothing
        dense = self.beside(inputs, anatomy.blocks(self.model).__getitem__) if behind else None
        if needs is nothing and not influence:
            by_block = self.without_data(anatomy)
        else:
            asked = self.with_input_gram(needs, dense)
            by_block = self.walk(anatomy, inputs, asked, influence, behind, dense, group=self.group)
        for block in by_block:
            seen = block.statistics
            sites = [site.name for site in anatomy.sites_of(block.index)]
            yield replace(block, statistics={name: {**self.felt.get(name, {}), **seen.get(name, {})} for name in sites})
        self.felt = _only(self.felt, names) if self.again and not behind else {}

    def with_input_gram(self, needs: Needs, dense: DensePath | None) -> Needs:
        """Return the needs with the input Gram in place of that of outputs, if targets are made from both paths."""
        return needs if dense is None else lambda shapes: needs(shapes) - {"output_gram"} | {self.method.input_gram}

    def feel(
        self,
        anatomy: Anatomy,
        inputs: BlockInputs,
        windows: Windows,
        names: frozenset[str],
        loss: Loss = "sampled",
        share: float = 1.0,
    ) -> Felt:
        """Collect what the loss feels at every site, and what every site reads, in one backward pass.

        Args:
            anatomy: after the probe pass.
            inputs: what the first block reads.
            windows: the tokens.
            names: of statistics.
            loss: how labels are chosen.
            share: of the batches, from the first on, at least one.
        """
        if share < 1:  # windows that are there twice are one observation: a share is of those that differ
            differing = len(set(map(tuple, windows.tokens.tolist()))) / len(windows.tokens)
            inputs = inputs.first(math.ceil(share * math.ceil(differing * len(inputs.calls))))
        windows = windows.first(sum(len(hidden) for hidden in inputs.hidden))
        self.felt_tokens = windows.real_tokens
        felt = gradient_accumulators(anatomy, names, inputs.device)
        labels = choose_labels(self.model, loss, self.recipe.calibration.seed, windows.labels)
        steps = len(anatomy.blocks(self.model)) * len(inputs.calls)
        with (
            self.watch("backward"),
            self.progress.stage(f"gradients ({inputs.dtype})", steps, "batch") as advance,
        ):
            backward(self.model, anatomy, inputs, windows.tokens, felt, labels, advance)
        return felt

    def walk(
        self,
        anatomy: Anatomy,
        inputs: BlockInputs,
        needs: Needs,
        influence: bool = False,
        behind: bool = False,
        dense: DensePath | None = None,
        name: str = "calibrate and solve",
        group: int = 1,
        observed: Callable[[int], nn.Module] | None = None,
    ) -> Iterator[WalkedBlock]:
        """Yield every block with the statistics of the forward pass that are needed."""
        blocks = anatomy.blocks(self.model)
        steps = len(blocks) * len(inputs.calls)
        with self.progress.stage(f"{name} ({inputs.dtype})", steps, "batch") as advance:
            passes = walk(blocks, anatomy, inputs, needs, advance, influence, behind, dense, group, observed)
            while True:
                with self.watch("walk"):
                    walked = next(passes, None)
                if walked is None:
                    return
                yield walked

    def without_data(self, anatomy: Anatomy) -> Iterator[WalkedBlock]:
        """Yield every block without running anything."""
        blocks = range(len(anatomy.blocks(self.model)))
        with self.progress.stage("solve", len(blocks), "block") as advance:
            for index in blocks:
                yield WalkedBlock(index, {})
                advance()


def _only(felt: Felt, names: frozenset[str]) -> Felt:
    return {site: {name: own[name] for name in names if name in own} for site, own in felt.items()}


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    names: frozenset[str],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Collect statistics once, on disk, for any number of compressions of the same dense model.

    Args:
        model: dense; unchanged.
        tokenizer: of the model.
        recipe: its calibration is read, and the option ``loss`` of its method where gradients are among the names.
        names: of statistics of inputs (``gram``, ``mean_gram``, ``magnitude``) and of gradients.
        folder: where one file a block is written; read by :func:`pared.calibration.saved_blocks`.
        progress: who watches; nobody by default.

    Raises:
        ParedError: the model or the text does not allow it.
    """
    work = Passes(model, tokenizer, recipe, progress or Silent())
    require_statistics(names, {*STATISTICS, *GRADIENT_STATISTICS})
    gradients = not STATISTICS.keys() >= names
    if gradients and (apart := sorted(names & (STATISTICS.keys() - GRADIENT_STATISTICS.keys()))):
        raise ParedError(f"statistic {apart[0]} is of what sites put out; collect it apart from gradients")
    if gradients and "loss" not in work.options:
        having = [name for name, method in METHODS.items() if "loss" in method.options]
        raise ParedError(
            f"method {recipe.method} has no option loss, which says whose gradients {', '.join(sorted(names))} are of; "
            f"collect them with a recipe of {' or '.join(having)}"
        )
    anatomy, calls = probe(model, anatomy_of(model, recipe))
    windows = work.windows()
    require_fits(model.config, windows)
    inputs = work.capture(anatomy, calls, windows)
    if gradients:
        felt = work.feel(anatomy, inputs, windows, names, work.loss)
        blocks = range(len(anatomy.blocks(model)))
        save_blocks(
            folder, (WalkedBlock(i, {s.name: felt.get(s.name, {}) for s in anatomy.sites_of(i)}) for i in blocks)
        )
    else:
        save_blocks(folder, work.walk(anatomy, inputs, lambda _: names, influence=True))
