"""What a recipe stands for, with every ``auto`` resolved; the type of a spec selects what does the work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pared.allocation import Budget, UnitOptions
from pared.allocation.units import Structures
from pared.engine.spec.base import Spec
from pared.engine.spec.passes import HandOn, PassSpec, Runs
from pared.lowrank import LowRankMethod, SharingOptions
from pared.sparsity import NM, PruningMethod

if TYPE_CHECKING:  # imports torch, which a dry run need not wait for
    from pared.lowrank.shrinkage import Shrinkage

# What runs on the dense model for what an allocation of zeros requires, a pass each.
EVIDENCE_FROM: tuple[tuple[str, Runs], ...] = (("alphas", "nothing"), ("losses", "backward"), ("scores", "forward"))


@dataclass(frozen=True)
class LowRankSpec(Spec):
    """A low-rank compression.

    Attributes:
        budget: how much may stay, and what a rank costs.
        statistics: when they are collected.
        refit: the stage that follows.
        dense_path: share of the dense model's outputs in targets.
    """

    method: LowRankMethod
    budget: Budget
    statistics: Literal["once", "sequential"]
    refit: Literal["off", "update", "sequential", "sequential-dense-block"]
    dense_path: float

    @property
    def sharing(self) -> str:
        """Which groups of neighbouring blocks share a basis."""
        return self.config.sharing if isinstance(self.config, SharingOptions) else "none"

    @property
    def structures(self) -> str:
        """What is made smaller: ``ranks``, ``widths``, or either (``mixed``)."""
        return self.budget.structures

    def with_structures(self, structures: Structures) -> "LowRankSpec":
        """Return the same compression of other structures."""
        return replace(self, budget=replace(self.budget, structures=structures))

    @property
    def heads(self) -> bool:
        """Whether heads of attentions can be taken out too."""
        asked, own = self.recipe.heads, self.method.heads
        if asked == "auto" and own is not None:
            return own and self.structures == "widths"
        # In one budget with ranks none was worth taking out; uniform widths are to be those of a plain model.
        return self.structures == "widths" and self.decided_from_data if asked == "auto" else asked == "on"

    @property
    def ordered_by_gram(self) -> bool:
        """Whether channels are ordered by a Gram, whose factor waits on the disk until widths are known."""
        return self.structures != "ranks" and any("gram" in name for name in self.requires([(1, 1)]))

    @property
    def elastic(self) -> bool:
        """Whether the folder is to hold every smaller size too."""
        return self.recipe.elastic

    @property
    def solves_first(self) -> bool:
        """Whether all is solved before anything is put in place, whatever the model turns out to be."""
        ordered = self.structures != "ranks"  # which channels stay is known once all are ordered
        return self.decided_from_data or ordered or self.refit != "off" or self.elastic

    def _widths(self) -> dict[str, object]:
        return {
            "structures": self.structures,
            "heads": "on" if self.heads else "off",
            "multiple_of": self.budget.multiple_of,
        }

    @property
    def shrinkage(self) -> "Mapping[str, Shrinkage]":
        """How far statistics are shrunk, by name."""
        return self.method.shrinkage(self.config)

    @property
    def gradient_share(self) -> float:
        """The share of the windows that go through a backward pass."""
        from pared.calibration.statistics import backward_data_fraction  # torch, which a dry run need not wait for

        return backward_data_fraction(self.gradients)

    @property
    def influence(self) -> bool:
        """Whether the allocation looks at how much every block changes the hidden states."""
        return "influence" in self.allocator.requires

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on a text: for statistics, a refit, the allocation, to refine it, or to round."""
        after = self.refine is not None or self.rounds_by_inputs
        return self.method_calibrated or self.refit != "off" or self.influence or after

    @property
    def tries(self) -> bool:
        """Whether the allocation tries what it proposes, on windows that are not calibrated on."""
        return "trial" in self.allocator.requires

    @property
    def sequential(self) -> bool:
        """Whether statistics are collected behind the compressed prefix; a method without any has none to collect."""
        return self.statistics == "sequential" and self.walked

    @property
    def has_targets(self) -> bool:
        """Whether a stage follows whose targets may be the dense model's outputs."""
        return self.sequential or self.refit != "off"

    @property
    def reference(self) -> bool:
        """Whether the dense model runs alongside where there are targets."""
        return self.has_targets and self.dense_path > 0

    @property
    def solving(self) -> Runs:
        """What runs on the dense model for the statistics of the method and of the allocation."""
        if self.influence and self.gradients:
            return "backward, then forward"
        return "forward" if self.influence else self.solving_for_method

    @property
    def solving_for_method(self) -> Runs:
        """What runs on the dense model for the statistics of the method."""
        if not self.method_calibrated:
            return "nothing"
        if not self.gradients:
            return "forward"
        return "backward, then forward" if self.gradient_share < 1 else "backward"

    def passes(self, ranks_known: bool | None = None) -> tuple[PassSpec, ...]:
        """Return the steps, in order.

        Args:
            ranks_known: whether the ranks are known before anything is solved; unless the model says otherwise where
                shapes alone decide them and nothing needs the decompositions of all sites.
        """
        if ranks_known is None:
            grouped = self.group_size > 1 and self.sharing != "none"
            ranks_known = not (self.solves_first or grouped)
        after = (*(() if self.refit == "off" else (self._refit_pass(),)), *self.refining, *self.quantizing)
        # Gradients are of the dense model, so that behind compressed blocks only what sites read is collected again.
        behind: Runs = "backward, then forward" if self.gradients and ranks_known else "forward"
        again = PassSpec("solve", behind, "compressed", self.dense_path > 0, installs=True)
        if ranks_known:
            once = PassSpec("solve", self.solving, installs=True)
            return (PassSpec("allocate"), again if self.sequential else once, *after)
        first = PassSpec("solve", self.solving)
        return (first, PassSpec("allocate"), again if self.sequential else PassSpec("install"), *after)

    def _refit_pass(self) -> PassSpec:
        hand_on: HandOn = "dense" if self.refit == "update" else "compressed"
        return PassSpec("refit", "forward", hand_on, self.dense_path > 0)

    def describe(self) -> dict[str, object]:
        """Return what the recipe's ``auto`` stands for, for the record."""
        return {
            "allocation": self.allocator.name,
            **self.allocation_config.model_dump(),
            **({} if self.structures == "ranks" else self._widths()),
            "storage": "pivoted" if self.budget.pivoted else "factors",
            "statistics": self.statistics,
            "refit": self.refit,
            **({"rounding": self.recipe.rounding} if self.quantized else {}),
            **({"dense_path": self.dense_path} if self.has_targets else {}),
            **self.use,
        }


@dataclass(frozen=True)
class SparseSpec(Spec):
    """A compression that makes weights zero.

    Attributes:
        sparsity: the fraction of zeros.
        pattern: N:M, if zeros follow one.
    """

    method: PruningMethod
    allocation_config: UnitOptions
    sparsity: float
    pattern: NM | None

    tries = False  # no allocation of zeros does

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on a text: for statistics, the allocation, or to refine it."""
        by_allocator = bool(self.allocator.requires & {"scores", "losses"})
        return self.method_calibrated or by_allocator or self.refine is not None

    @property
    def granularity(self) -> str:
        """What gets one sparsity: a ``block`` or a ``site``."""
        return self.allocation_config.granularity

    @property
    def budget(self) -> Budget:
        """How much of the target modules may stay."""
        return Budget(1 - self.sparsity, sparsity=self.sparsity)

    def passes(self) -> tuple[PassSpec, ...]:
        """Return the steps, in order."""
        evidence = (PassSpec("evidence", runs) for kind, runs in EVIDENCE_FROM if kind in self.allocator.requires)
        prune = PassSpec("solve", "forward", "compressed") if self.method_calibrated else PassSpec("solve")
        return (*evidence, PassSpec("allocate"), replace(prune, installs=True), *self.refining)

    def describe(self) -> dict[str, object]:
        """Return what the recipe's ``auto`` stands for, for the record."""
        return {"allocation": self.allocator.name, **self.allocation_config.model_dump(), **self.use}


@dataclass(frozen=True)
class ExpertSpec(Spec):
    """A compression that takes whole experts out of mixtures, as many of every layer."""

    method: LowRankMethod

    tries = False  # how many stay is known from shapes
    method_calibrated = calibrated = True
    gradients: frozenset[str] = frozenset()  # those of experts are no statistic of a layer

    def requires(self, shapes: Sequence[tuple[int, int]]) -> frozenset[str]:  # noqa: ARG002 - as every spec
        """Return no statistic of a layer."""
        return frozenset()

    @property
    def budget(self) -> Budget:
        """How much of the experts may stay."""
        return Budget(self.recipe.keep)

    @property
    def backward(self) -> bool:
        """Whether the score is one of gradients."""
        return bool(self.method.gradients(self.config))

    def passes(self) -> tuple[PassSpec, ...]:
        """Return the steps, in order."""
        solve = PassSpec("solve", "backward" if self.backward else "forward")
        return (solve, PassSpec("allocate"), PassSpec("install"))

    def describe(self) -> dict[str, object]:
        """Return what the recipe's ``auto`` stands for, for the record."""
        return {"allocation": self.allocator.name, "structures": "experts", **self.use}


CompressionSpec = LowRankSpec | SparseSpec | ExpertSpec
