"""Orders channels and heads as statistics come in, and makes layers narrower once it is known how many stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pared.allocation.units import Channels as Candidate
from pared.calibration import CROSS, BlockStatistics
from pared.engine.checks.enough import why_dense
from pared.engine.install import Narrowed, count, factors_of, narrow, put
from pared.engine.observe import Observer
from pared.engine.ranks.decompose import lacking
from pared.engine.ranks.kept_units import ranks_of_narrow
from pared.engine.ranks.narrow import composes, energies, rest
from pared.engine.spec import LowRankSpec
from pared.engine.state.ledger import Findings, Ledger
from pared.engine.state.solutions import Copy, DecompositionStore
from pared.engine.statistics.moments import StatisticsOfSite, dense_target, moments
from pared.errors import ParedError
from pared.lowrank import Factors
from pared.modules import LowRankLinear
from pared.processes import ALONE, Processes
from pared.schema.plan import Plan
from pared.schema.width import Width, ranges_of
from pared.structure import Site, weight_of
from pared.structure.channels import find_channels
from pared.structure.groups import ChannelGroup, Producer
from pared.widths import Channels, GroupLayers, Maker

PARTS = ("C_NN", "mean_N")  # of how channels are ordered, kept where they are there


@dataclass
class _Found:
    """What came of one group, as it is sent to the other processes.

    Attributes:
        order: its channels, where widths are not known yet.
        made: what is left of its layers, where they are known.
        findings: of it.
    """

    order: Copy | None = None
    made: Narrowed | None = None
    findings: Findings = field(default_factory=Findings)


class ChannelSolver:
    """The widths of one method at work on one model, beside the ranks of a :class:`pared.engine.solve.Solver`.

    Attributes:
        ledger: what was found, for the record of a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: LowRankSpec,
        groups: Sequence[ChannelGroup],
        plan: Plan | None = None,
        *,
        store: DecompositionStore,
        tokens: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        """Start.

        Args:
            model: changed in place.
            spec: says how channels are ordered.
            groups: that may become narrower.
            plan: the widths; none if they depend on what is found, which is then kept until they are known.
            store: that keeps it.
            tokens: of the text, which costs are averaged over.
            processes: that solve together: each takes some of the groups, and the first keeps what was found.
        """
        self._model, self._spec, self._tokens, self._processes = model, spec, tokens, processes
        self._groups = list(groups)
        self._widths = None if plan is None else widths_of(plan)
        self._ranks = {} if plan is None else ranks_of_narrow(plan)
        self.ledger = Ledger(store, processes, "channels_")

    @property
    def found(self) -> Findings:
        """What was found so far."""
        return self.ledger.found

    def candidates(self) -> dict[str, Candidate]:
        """Return the groups of which costs are known, for an allocation; the first process keeps what it takes."""
        return {one.name: self._candidate(one) for one in self._groups if one.name in self.ledger.store.spectra}

    def _candidate(self, group: ChannelGroup) -> Candidate:
        store, shifts = self.ledger.store, self._spec.method.shifts
        cost_N = store.spectra[group.name]
        if not composes(self._spec, group):
            return Candidate(group, cost_N, shifts)
        rows = store.tensor(group.name, "energy_PG")
        made = {one.site.name: row_G for one, row_G in zip(group.producers, rows, strict=True)}
        return Candidate(group, cost_N, shifts, made)

    def of(self, block: BlockStatistics) -> BlockStatistics:
        """Return a block with what is read of it here, before another visit uses that up."""
        own = [site.name for one in self._groups if one.consumer.block == block.index for site in one.sites]
        return replace(block, statistics={name: block.statistics.get(name, {}) for name in own})

    def visit(self, block: BlockStatistics) -> None:
        """Order the channels of the groups of a block; make them narrower if their widths are known."""
        ready = [one for one in self._groups if one.consumer.block == block.index and self._is_wanted(one, block)]
        found = self._processes.each(ready, lambda one: self._take(one, block))
        for group, one in zip(ready, found, strict=True):
            self._accept(group, one)

    def install(self, groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> None:
        """Make kept groups narrower, from what was found of them."""
        for group in groups:

            def cut(group: ChannelGroup = group) -> Narrowed:
                module, width = self._model.get_submodule(group.name), widths[group.name]
                factors = factors_of([module]) if isinstance(module, LowRankLinear) else None
                W_ON = (self._dense(group.consumer) if factors is None else factors.down).double()
                there = {name: one.to(W_ON.device) for name, one in self.ledger.store.copy(group.name).tensors.items()}
                found = Channels(W_ON, there["order_G"], there["spectrum"], there.get("C_NN"), inputs=group.inputs,
                                 mean_N=there.get("mean_N"))  # fmt: skip
                fitted = found.weight(width)  # what makes up for a weight does so for its factors
                read = fitted if factors is None else Factors(fitted, factors.up.double())
                return Narrowed(found.kept(width), read, found.shift(width))

            self._put(group, self._processes.first(cut))

    def not_reached(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Return those of some groups that were not reached behind compressed blocks."""
        return [one for one in groups if one.name not in self.found.kept]

    def take_over(self, first: "ChannelSolver", missed: Sequence[ChannelGroup]) -> None:
        """Make groups that were not reached narrower by what was found of the dense model."""
        first.install(missed, self._widths or {})
        self.found.kept.update({one.name: first.found.kept[one.name] for one in missed})

    def in_block(self, index: int, plan: Plan) -> list[ChannelGroup]:
        """Return the groups of a block that a plan gives a width."""
        planned = widths_of(plan)
        return [one for one in self._groups if one.consumer.block == index and one.name in planned]

    def _is_wanted(self, group: ChannelGroup, block: BlockStatistics) -> bool:
        """Whether there is something to find of a group: it got enough tokens, and no plan leaves it as it is."""
        own = block.statistics.get(group.name, {})
        if why := why_dense(self._model, group.name, own):
            self.found.unreached.update({site.name: why for site in group.sites})
        known = bool(own) or not self._spec.method_calibrated
        return known and not why and not group.consumer.idle and (self._widths is None or group.name in self._widths)

    def _take(self, group: ChannelGroup, block: BlockStatistics) -> _Found:
        spec, rule, own = self._spec, self._spec.method.widths, block.statistics.get(group.name, {})
        assert rule is not None
        values, told = self._values(own), _Found()
        W_ON = self._aim(group.consumer, own, told)
        width = 0 if self._widths is None else self._widths[group.name]
        W_ON = W_ON.to(next(iter(values.values()), W_ON).device)

        def makers() -> list[Maker]:
            return [self._maker(one, group, block) for one in group.producers]

        try:
            found: Channels = rule(GroupLayers(W_ON, values, group.inputs, width, makers), spec.config)
        except KeyError as missing:
            raise lacking(spec.method.name, group.name, missing, values) from missing
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {group.name}: {error}") from error
        if found.damping:
            told.findings.damping[group.name] = found.damping
        if found.fallback:
            told.findings.fallbacks[group.name] = found.fallback
        if self._widths is None:
            parts = {name: one.float() for name in PARTS if (one := getattr(found, name)) is not None}
            if composes(spec, group):
                parts["energy_PG"] = energies(spec, makers())[:, found.order_G]
            told.order = Copy({"spectrum": found.costs_N.cpu(), "order_G": found.order_G, **parts}, found.damping)
        else:
            told.made = self._made(group, found, values, block, told)
        return told

    def _aim(self, site: Site, own: StatisticsOfSite, told: _Found) -> torch.Tensor:
        """Return the weight that a layer ought to have, if the dense model ran alongside; else its own."""
        aim = dense_target(self._spec, self._dense(site), own)
        if aim.lacking:
            told.findings.untargeted[site.name] = True
        return self._dense(site) if aim.W_ON is None else aim.W_ON

    def _made(
        self,
        group: ChannelGroup,
        found: Channels,
        values: Mapping[str, torch.Tensor],
        block: BlockStatistics,
        told: _Found,
    ) -> Narrowed:
        """Return what is left of a group's layers at the width of the plan."""
        width, ranked = self._widths[group.name] if self._widths else 0, {}
        kept_K, fitted_OK = found.kept(width), found.weight(width)
        read: torch.Tensor | Factors = fitted_OK
        if (decided := self._ranks.get(group.name)) is not None:
            read = rest(self._spec, group.name, fitted_OK, values, decided.rank, inputs=group.read(kept_K))
        for producer in group.producers:
            name, rows_K = producer.site.name, producer.outputs(kept_K)
            if (decided := self._ranks.get(name)) is not None:
                own = block.statistics[name]
                W_KN = self._aim(producer.site, own, told)[rows_K]
                ranked[name] = rest(self._spec, name, W_KN, self._values(own), decided.rank, outputs=rows_K)
        return Narrowed(kept_K, read, found.shift(width), ranked)

    def _values(self, own: StatisticsOfSite) -> dict[str, torch.Tensor]:
        """Return the statistics of a site as the method reads them."""
        return {name: moments(self._spec, name, one, self._tokens).value for name, one in own.items() if name != CROSS}

    def _maker(self, one: Producer, group: ChannelGroup, block: BlockStatistics) -> Maker:
        rows_PGR = one.outputs(torch.arange(group.channels)).view(one.parts, group.channels, -1)
        values = self._values(block.statistics.get(one.site.name, {}))
        device = next(iter(values.values()), rows_PGR).device
        return Maker(self._dense(one.site).to(device), values, rows_PGR.transpose(0, 1).flatten(1).to(device))

    def _accept(self, group: ChannelGroup, found: _Found) -> None:
        self.found.add(found.findings.tables())
        if found.order is not None:
            self.ledger.store.note(group.name, found.order.tensors["spectrum"])
            if self._processes.is_first:
                self.ledger.store.write(group.name, found.order)
        if found.made is not None:
            self._put(group, found.made)

    def _put(self, group: ChannelGroup, made: Narrowed) -> None:
        made = made.to(next(self._model.get_submodule(group.name).parameters()).device)
        layers = narrow(self._model, group, made, self._spec.budget.pivoted)
        put(self._model, [name for name, _ in layers], [module for _, module in layers])
        count(self._model, group, len(made.kept_K))
        self.found.kept[group.name] = ranges_of(made.kept_K.tolist())

    def _dense(self, site: Site) -> torch.Tensor:
        return weight_of(self._model.get_submodule(site.name)).detach()


def channels_to_take_out(observer: Observer, spec: LowRankSpec) -> tuple[ChannelGroup, ...]:
    """Return the channel groups of a model, each proved.

    Args:
        observer: that has probed the model.
        spec: of the compression.

    Raises:
        ParedError: there are none, and nothing else is to be decided.
    """
    anatomy, heads = observer.anatomy, spec.heads
    with observer.watch("probe"), observer.store.running():
        found = find_channels(anatomy.blocks(observer.model), anatomy, observer.calls, heads)
    if spec.recipe.heads == "on" and not any(one.unit == "head" for one in found.groups):
        told = next((f"; {name}: {why}" for name, why in found.reasons.items() if "heads" in why), "")
        observer.progress.note(f"no heads were found that can be taken out{told}")
    if found.groups:
        return found.groups
    name, why = next(reversed(found.reasons.items()))
    text = f"no channels were found that can be taken out; {name}: {why}"
    if spec.structures == "widths":
        raise ParedError(f"structures widths: {text}; take ranks")
    observer.progress.note(f"{text}; ranks alone are decided")
    return ()


def widths_of(plan: Plan) -> dict[str, int]:
    """Return the widths of a plan by the names of the sites that read the channels."""
    return {
        site.name: site.decision.width
        for site in plan.sites
        if isinstance(site.decision, Width) and site.decision.side == "in"
    }


def with_kept(plan: Plan, kept: Mapping[str, str]) -> Plan:
    """Return a plan that names the channels that stay, with the sites that read them."""

    def told(site: Any) -> Any:
        if site.name not in kept or not isinstance(site.decision, Width):
            return site
        return site.model_copy(update={"decision": site.decision.model_copy(update={"kept": kept[site.name]})})

    return plan.model_copy(update={"sites": tuple(told(site) for site in plan.sites)})
