"""What the specs of all families have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pared.allocation import Allocator
from pared.data.uses import use_in_words
from pared.engine.spec.passes import REFINE, PassSpec, Runs
from pared.lowrank import DrawnOptions, GradientOptions, SharingOptions
from pared.methods import Method
from pared.schema.options import Options
from pared.schema.recipe import Calibration, Recipe, Refinement


@dataclass(frozen=True)
class Spec:
    """What the spec of every family has.

    Attributes:
        recipe: that was resolved, for the record.
        method: that does the work.
        config: options of the method.
        allocator: that spreads the budget.
        allocation_config: options of the allocator.
    """

    recipe: Recipe
    method: Method
    config: Options
    allocator: Allocator
    allocation_config: Options

    def requires(self, shapes: Sequence[tuple[int, int]]) -> frozenset[str]:
        """Return the statistics of the forward pass that the method reads, from the shapes of what reads one tensor."""
        return self.method.requires(shapes, self.config)

    @property
    def walked(self) -> bool:
        """Whether the method reads statistics of the forward pass."""
        return bool(self.requires([(1, 1)]))

    @property
    def gradients(self) -> frozenset[str]:
        """Names of the statistics of a backward pass that the method reads."""
        return self.method.gradients(self.config)

    @property
    def backward(self) -> bool:
        """Whether the method needs a backward pass."""
        return bool(self.gradients)

    @property
    def loss(self) -> Literal["sampled", "labels"]:
        """How the labels of a backward pass are chosen."""
        return self.config.loss if isinstance(self.config, GradientOptions) else "sampled"

    @property
    def labels_per_token(self) -> int:
        """How many labels a token is given in a backward pass."""
        return self.config.labels_per_token if isinstance(self.config, DrawnOptions) else 1

    @property
    def gradient_clip(self) -> float:
        """How many times the median of its window the gradient of a token may be long; 0 for no limit."""
        return self.config.gradient_clip if isinstance(self.config, DrawnOptions) else 0.0

    @property
    def method_calibrated(self) -> bool:
        """Whether the method needs data at all."""
        return self.walked or bool(self.gradients)

    @property
    def decided_from_data(self) -> bool:
        """Whether more than shapes decides what every site keeps."""
        return bool(self.allocator.requires)

    @property
    def calibration(self) -> Calibration:
        """What is calibrated on."""
        return self.recipe.calibration

    @property
    def use(self) -> dict[str, object]:
        """What ``calibrate_on`` stands for, for the record; nothing without one."""
        return {} if self.recipe.calibrate_on is None else {"calibrate_on": use_in_words(self.recipe)}

    @property
    def refine(self) -> Refinement | None:
        """How blocks are trained once they are compressed; None if they are not."""
        return self.recipe.refine

    @property
    def refining(self) -> tuple[PassSpec, ...]:
        """The last pass, if there is one that trains blocks."""
        return () if self.refine is None else (REFINE,)

    @property
    def quantized(self) -> bool:
        """Whether anything is stored in few bits."""
        return self.recipe.quantize is not None or self.recipe.of_bytes

    @property
    def rounds_by_inputs(self) -> bool:
        """Whether the model is run on a text to round what is stored in few bits."""
        return self.quantized and self.recipe.rounding == "feedback"

    @property
    def quantizing(self) -> tuple[PassSpec, ...]:
        """The pass that stores everything in few bits, if there is one; the last of all."""
        runs: Runs = "forward" if self.rounds_by_inputs else "nothing"
        return (PassSpec("quantize", runs, "compressed"),) if self.quantized else ()

    @property
    def group_size(self) -> int:
        """How many neighbouring blocks are compressed together."""
        return self.config.group_size if isinstance(self.config, SharingOptions) else 1

    def group_of(self, step: PassSpec) -> int:
        """Return how many neighbouring blocks a pass changes together: one where each is fitted behind the others."""
        return 1 if step.replaces else self.group_size
