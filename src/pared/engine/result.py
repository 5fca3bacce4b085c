"""What a compression hands back, whatever the method."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel

from pared.engine.checks.enough import dense_for_want_of_tokens
from pared.engine.elastic import ElasticFactors
from pared.engine.spec import CompressionSpec
from pared.engine.targets.grouping import Comparison
from pared.names import called
from pared.schema.manifest import Refined, TooFew
from pared.schema.plan import Dense, Plan
from pared.schema.recipe import Recipe
from pared.structure import Anatomy


@dataclass(kw_only=True, repr=False)
class Findings:
    """What a compression found besides its plan.

    Attributes:
        damping: sites whose Gram was rank-deficient, with the relative damping used.
        shrinkage: how far the statistics of every site were drawn towards their mean diagonal, by site and statistic.
        sharing: for every group that was compared, what it loses with one basis and what with its members' own.
        fallbacks: sites whose weight or statistics say nothing (zero inputs, no gradient), with the rule that decided.
        refined: what training every block came to, in order; empty where none was trained.
        elastic: what smaller sizes are made of, of a recipe with ``elastic``; none of others.
        calibration: what was calibrated on; none for a method that needs no data.
        too_few: what is lacking of that text, where it has fewer tokens than its Grams take.
        seconds: by stage.
    """

    sharing: tuple[Comparison, ...] = ()
    damping: dict[str, float] = field(default_factory=dict)
    shrinkage: dict[str, dict[str, float]] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    refined: tuple[Refined, ...] = ()
    elastic: ElasticFactors | None = None
    calibration: dict[str, object] | None = None
    too_few: TooFew | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class CompressedBlocks(Findings):
    """A compressed model and how it came about.

    Attributes:
        model: the model, changed in place; plain ``save_pretrained`` writes a folder that loads again.
        spec: the resolved compression.
        plan: what was decided, with what calibration taught.
    """

    model: PreTrainedModel
    spec: CompressionSpec
    plan: Plan = field(init=False)

    @property
    def recipe(self) -> Recipe:
        """What was asked for."""
        return self.spec.recipe


def found_by(result: Findings) -> dict[str, Any]:
    """Return what a result found, by name, as another result takes it."""
    return {one.name: getattr(result, one.name) for one in fields(Findings)}


def stacks(anatomy: Anatomy) -> Iterator[str]:
    """Say which list of blocks is compressed, and how to name another, where a model has several."""
    if anatomy.other_stacks:
        others = ", ".join(anatomy.other_stacks)
        yield (
            f"compressed are the blocks of {anatomy.blocks_path}; left alone are {others}: {called('blocks', 'NAME')} "
            "takes another"
        )


def remarks(plan: Plan, fallbacks: Mapping[str, str]) -> Iterator[str]:
    """Say what is not a target, what the budget could not reach, and where a rule replaced what is not known."""
    if plan.uncovered:
        first = plan.uncovered[0]
        yield (
            f"not targeted: {len(plan.uncovered)} weights, {plan.uncovered_share:.1%} of the parameters inside the "
            f"blocks, the first is {first.name} {first.shape} ({first.reason})"
        )
    dense = [site for site in plan.sites if isinstance(site.decision, Dense)]
    if dense and plan.keep < 1:
        unreached = dense_for_want_of_tokens([one.decision.reason for one in dense if isinstance(one.decision, Dense)])
        told = "".join(f"; {count} of them, as {said}" for said, count in unreached.items())
        yield f"{len(dense)} sites stay dense, the first is {dense[0].name}{told}"
    if plan.missed:
        yield plan.missed
    if fallbacks:
        name, rule = next(iter(fallbacks.items()))
        yield f"{len(fallbacks)} fallbacks, all in the manifest; the first is {name}: {rule}"
