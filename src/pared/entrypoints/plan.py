"""What a compression of a model by name would do, from its configuration and the shapes of its weights."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from pared.engine.allocate import anatomy_of, plan_from_shapes
from pared.engine.checks.early import require_model, require_possible, require_suited
from pared.engine.cost.channels import groups_by_shape, uniform_widths
from pared.engine.result import stacks
from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec
from pared.engine.targets.opening import opened_shapes, shapes_of
from pared.errors import ParedError
from pared.modules.opened import opened_experts
from pared.report.sites import kinds_table, layers_table
from pared.schema.cost import Cost
from pared.schema.plan import Plan
from pared.schema.recipe import Recipe
from pared.structure.probe import probe_shapes
from pared.tables import Table


@dataclass(frozen=True)
class Planned:
    """A plan, and what is to be said of it.

    Attributes:
        plan: every site's decision.
        spec: the recipe resolved.
        stacks: which list of blocks is compressed, where a model has several.
        source: what the model is, where sizes are not those of its files.
        cost: what it is predicted to take, if that is asked for.
        opened: how many experts become layers of their own, and in how many mixtures.
    """

    plan: Plan
    spec: CompressionSpec
    stacks: tuple[str, ...] = ()
    source: str | None = None
    cost: Cost | None = None
    opened: tuple[int, int] = (0, 0)

    def tables(self, full: bool = False) -> Iterator[Table]:
        """Yield the sizes before and after, and the decisions.

        Args:
            full: a row for every layer, not for every kind of layer.
        """
        recipe = self.spec.recipe
        title = f"{recipe.model}  {recipe.method}  {recipe.budget}"
        yield Table.comparison(title, self.plan.sizes(), tuple(self.remarks()))
        yield layers_table(self.plan, self.stacks) if full else kinds_table(self.plan, self.stacks)
        if self.cost is not None:
            yield self.cost.table()

    def describe(self) -> dict[str, Any]:
        """Return the plan, and its cost if that is known, as JSON has it."""
        told = self.plan.model_dump(mode="json")
        return told if self.cost is None else {**told, "cost": self.cost.model_dump(mode="json")}

    def remarks(self) -> Iterator[str]:
        """Yield what the model is, what every ``auto`` stands for, the passes, and what cannot be known or reached."""
        if self.source is not None:
            yield self.source
        settled = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.spec.describe().items())
        yield f"resolved: {settled}"
        if passes := "; ".join(map(str, self.spec.passes())):
            yield f"passes over the blocks: {passes}"
        if self.spec.decided_from_data:
            yield f"allocation {self.spec.allocator.name} looks at the model or data; this is uniform"
        if isinstance(self.spec, LowRankSpec) and self.spec.structures == "mixed":
            yield "structures mixed: which widths is seen by running the model; these are ranks alone"
        if _is_of_widths(self.spec):
            left = ", and attentions are left whole, whose heads can go too" if self.spec.heads else ""
            yield (
                "structures widths: which layers read channels is proved by running the model; these are uniform "
                f"widths of what is an MLP by its shapes{left}"
            )
        if isinstance(self.spec, ExpertSpec):
            yield "which experts stay, and whether they can be taken out, is seen by running the model"
        if self.opened[0]:
            experts, mixtures = self.opened
            yield f"{experts:,} experts of {mixtures} mixtures are opened: two layers each, first and second"
        if self.plan.missed:
            yield self.plan.missed


def plan_by_shapes(model: PreTrainedModel, spec: CompressionSpec, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone, with uniform widths of MLPs where widths are what is decided.

    Args:
        model: loaded, or on the meta device; it is not changed.
        spec: of the compression.
        bytes_per_parameter: of the dtype the model is saved in; that of the model if it is not given.

    Raises:
        ParedError: nothing to compress, a budget too small, or no widths that shapes tell.
    """
    if not _is_of_widths(spec):
        return plan_from_shapes(model, spec, bytes_per_parameter)
    if model.device.type != "meta":
        model = shapes_of(model)
    model = opened_shapes(model, spec)
    anatomy = probe_shapes(model, anatomy_of(model, spec.recipe))
    heads = "; heads, which can go too, are not known from shapes: compress the model to see" if spec.heads else ""
    if not (groups := groups_by_shape(anatomy, spec)):
        raise ParedError("structures widths: no layers have the shapes of an MLP, and which channels can be taken out "
                         f"is not known without running the model{heads}")  # fmt: skip
    try:
        return uniform_widths(anatomy, spec, groups, bytes_per_parameter or model.dtype.itemsize)
    except ParedError as error:
        raise ParedError(f"{error}{heads}") from error


def _is_of_widths(spec: CompressionSpec) -> TypeGuard[LowRankSpec]:
    """Whether widths alone are decided."""
    return isinstance(spec, LowRankSpec) and spec.structures == "widths"


def plan_of(recipe: Recipe, cost: bool = False, machine: str | None = None) -> Planned:
    """Decide what a compression would keep of every layer, without reading a weight.

    Args:
        recipe: with ``model``.
        cost: whether to predict time, memory and disk, for which this machine is measured for about 20 seconds, unless
            it was within a week.
        machine: predict for another one, by published figures: ``h100``.

    Raises:
        ParedError: what a compression refuses of such a recipe and model.
    """
    spec = require_possible(recipe)
    source = require_model(spec)
    require_suited(source.config(), spec, source.name)
    skeleton = opened_shapes(source.skeleton(), spec)
    plan = plan_by_shapes(skeleton, spec, source.weight_bytes(recipe.dtype))
    note = f"{source.name} is {source.origin}" if source.is_dequantised else None
    mixtures = opened_experts(skeleton).values()
    opened = sum(one.count for one in mixtures), len(mixtures)
    planned = Planned(plan, spec, tuple(stacks(anatomy_of(skeleton, recipe))), note, opened=opened)
    if not cost and machine is None:
        return planned
    from pared.entrypoints.cost import cost_of_source, rates_of

    rates = rates_of(machine, recipe.device)
    return replace(planned, cost=cost_of_source(source, spec, plan, rates))
