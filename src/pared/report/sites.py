"""What is decided for the layers of a model: kind by kind, as a map over the blocks, or layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from pared.names import called
from pared.schema.bits import InFewBits
from pared.schema.plan import NM, Decision, Dense, LowRank, Plan, Shared, SitePlan, Sparse
from pared.schema.width import Width
from pared.tables import Table

LEVELS = "▁▂▃▄▅▆▇█"  # of the share that stays, in eighths
ALIKE = "·"  # a block without such a layer
COLUMNS = 60  # blocks that a row of the map has; of more, some stand together


@dataclass
class _Kind:
    """Layers of one kind, shape and sort of decision."""

    sites: list[SitePlan] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        return [site.after / site.before for site in self.sites]


def kinds_table(plan: Plan, notes: Sequence[str] = (), hint: bool = True) -> Table:
    """Return a row for all layers of one kind and sort of decision: least, median and largest of what is decided.

    Args:
        plan: of a model.
        notes: said below, before the map.
        hint: whether it is said how every layer is listed.
    """
    counted: dict[tuple[str, str, str], _Kind] = {}
    for site in plan.sites:
        key = (site.kind, f"{site.out_features} x {site.in_features}", _sort(site))
        counted.setdefault(key, _Kind()).sites.append(site)
    rows = [
        (kind, f"{len(one.sites):,}", shape, _spread_of(one.sites), _spread(one.kept, lambda share: f"{share:.0%}"),
         f"{sum(site.after for site in one.sites):,}")
        for (kind, shape, _), one in counted.items()
    ]  # fmt: skip
    left: dict[tuple[str, str, str], list[int]] = {}
    for weight in plan.uncovered:
        place = ".".join(part for part in weight.name.split(".") if not part.isdigit())
        shape = " x ".join(map(str, weight.shape))
        left.setdefault((place, shape, f"not targeted: {weight.reason}"), []).append(weight.parameters)
    rows += [(*key[:1], f"{len(each):,}", *key[1:], "100%", f"{sum(each):,}") for key, each in left.items()]
    more = (f"every layer by name: {called('full', 'True')}",) if hint else ()
    columns = ("layers", "number", "out x in", "least / median / most", "kept", "parameters")
    return Table("", columns, rows, (*notes, *rank_map(plan), *more), align="lrrlrr", faint_from=len(counted))


def layers_table(plan: Plan, notes: Sequence[str] = ()) -> Table:
    """Return a row for every layer.

    Args:
        plan: of a model.
        notes: said below.
    """
    rows = [
        (site.name, f"{site.out_features} x {site.in_features}", _decision(site), f"{site.after:,}")
        for site in plan.sites
    ]
    rows += [
        (weight.name, " x ".join(map(str, weight.shape)), f"not targeted: {weight.reason}", f"{weight.parameters:,}")
        for weight in plan.uncovered
    ]
    return Table("", ("site", "out x in", "decision", "parameters"), rows, notes, align="lrlr",
                 faint_from=len(plan.sites))  # fmt: skip


def rank_map(plan: Plan) -> Iterator[str]:
    """Yield, for every kind of layer, how much of it stays in each block, in eighths; nothing where all are alike.

    Blocks of which there are more than fit in a line stand together, with their mean.
    """
    shares = shares_of(plan)
    levels = {_level(share) for by_block in shares.values() for each in by_block.values() for share in each}
    if len(levels) < 2:
        return
    last = max(block for by_block in shares.values() for block in by_block)
    together = -(-(last + 1) // COLUMNS)
    width = max(map(len, shares))
    by = f", {together} blocks a column" if together > 1 else ""
    yield f"kept of each layer from block 0 to {last}{by} ({LEVELS[0]} an eighth at most, {LEVELS[-1]} more than seven)"
    for kind, by_block in shares.items():
        cells = (
            [share for block in range(start, start + together) for share in by_block.get(block, ())]
            for start in range(0, last + 1, together)
        )
        yield f"{kind:<{width}}  {''.join(_level(sum(each) / len(each)) if each else ALIKE for each in cells)}"


def shares_of(plan: Plan) -> dict[str, dict[int, list[float]]]:
    """Return how much stays of every layer, 0 to 1, by kind and block."""
    shares: dict[str, dict[int, list[float]]] = {}
    for site in plan.sites:
        shares.setdefault(site.kind, {}).setdefault(site.block, []).append(site.after / site.before)
    return shares


def _level(share: float) -> str:
    return LEVELS[min(len(LEVELS) - 1, max(0, -int(-share * len(LEVELS) // 1) - 1))]


def _sort(site: SitePlan) -> str:
    """Return what must be equal in layers that stand in one row."""
    choice = site.decision
    if isinstance(choice, Dense):
        return _decision(site)
    marks = [str(getattr(choice, name, "")) for name in ("kind", "pivoted", "unit", "side")]
    return " ".join([*marks, str(choice) if isinstance(choice, NM) else "", str(getattr(choice, "rank", None) is None),
                     _form(choice)])  # fmt: skip


def _decision(site: SitePlan) -> str:
    choice = site.decision
    return f"dense{choice.form}: {choice.reason}" if isinstance(choice, Dense) else str(choice)


def _form(decision: Decision) -> str:
    """Return in how few bits a decision's weights are stored, as the end of a sentence."""
    return decision.form if isinstance(decision, InFewBits) else ""


def _spread_of(sites: Sequence[SitePlan]) -> str:
    """Return what is decided for layers of one sort: a number, or its least, median and largest."""
    first = sites[0].decision
    decided = [site.decision for site in sites]
    if isinstance(first, (LowRank, Shared)):
        ranks = [one.rank for one in decided if isinstance(one, (LowRank, Shared))]
        ends = [*(["pivoted"] if first.pivoted else []), *(["shared"] if isinstance(first, Shared) else [])]
        return ", ".join([f"rank {_spread(ranks, str)}", *ends]) + _form(first)
    if isinstance(first, Sparse):
        return f"sparsity {_spread([one.sparsity for one in decided if isinstance(one, Sparse)], '{:.3g}'.format)}"
    if isinstance(first, Width):
        widths = [one for one in decided if isinstance(one, Width)]
        most = ", ".join(map(str, sorted({one.channels for one in widths})))
        unit = "width" if first.unit == "channel" else f"{first.unit}s"
        text = f"{unit} {_spread([one.width for one in widths], str)} of {most}"
        ranks = [one.rank for one in widths if one.rank is not None]
        ranked = f", rank {_spread(ranks, str)}{', pivoted' if first.pivoted else ''}" if ranks else ""
        return text + ranked + first.form
    return _decision(sites[0])


def _spread(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return least, median and largest of numbers, one where they are written alike."""
    texts = [written(min(values)), written(median_low(values)), written(max(values))]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)
