"""Decomposed units whose ranks are decided later: kept by the process that decomposed them, installed in all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from pared.allocation import Unit
from pared.engine.install import made, put, unchanged
from pared.engine.state.ledger import Ledger
from pared.engine.state.pass_record import Record
from pared.engine.state.solutions import Prices
from pared.errors import ParedError
from pared.lowrank import Decomposition, Factors
from pared.lowrank.sharing import stacked
from pared.memory import give_back
from pared.names import called
from pared.processes import Processes
from pared.schema.plan import Decision, LowRank, Plan, Shared
from pared.schema.width import Width
from pared.structure import Site, weight_of
from pared.structure.store import BlockStore, LazyBlocks, ResidentBlocks

Installed = tuple[list[str], list[nn.Module]]  # names of layers, and what is put in their places


class KeptUnits:
    """What a solver decomposed without a plan: sites alone, and groups where a shared basis pays.

    Args:
        model: changed in place.
        ledger: whose findings name the units, and whose store holds their decompositions.
        sites: by name, all that may be in a unit.
        processes: that solve together; each keeps the decompositions it made.
        with_dense: keep the dense weights too, for a refit.
    """

    def __init__(
        self, model: nn.Module, ledger: Ledger, sites: Mapping[str, Site], processes: Processes, with_dense: bool
    ) -> None:
        self._model, self._ledger, self._sites, self._processes = model, ledger, sites, processes
        self._with_dense = with_dense
        self._owners: dict[str, int] = {}  # rank of the process that keeps the decomposition, by unit
        self._rows: dict[str, tuple[str, slice]] = {}  # where the dense weights are that were kept, by site

    def __iter__(self) -> Iterator[Unit]:
        """All units, and sites that were left alone."""
        for members in self._ledger.found.units.values():
            yield Unit(tuple(self._sites[name] for name in members))

    @property
    def spectra(self) -> Mapping[str, torch.Tensor]:
        """For every unit that was decomposed, by any process, what leaving out each direction costs."""
        return self._ledger.store.spectra

    @property
    def rounding(self) -> Mapping[str, Prices]:
        """For every unit whose bits are decided, what rounding costs, by form."""
        return self._ledger.store.rounding

    def keep(self, unit: Unit, found: Decomposition, prices: Prices) -> torch.Tensor:
        """Keep a decomposition in this process, and return what leaving out each direction costs."""
        self._ledger.store.put(unit.name, found, self._weight(unit) if self._with_dense else None, prices)
        return self.spectra[unit.name]

    def note(self, unit: Sequence[str], owner: int) -> None:
        """Note which process keeps a unit, by the names of its members, and which rows are each member's."""
        start = 0
        for name in unit:
            end = start + self._sites[name].out_features
            self._rows[name] = unit[0], slice(start, end)
            start = end
        self._owners[unit[0]] = owner

    def take_up(self, record: Record) -> None:
        """Take the units that an earlier job decomposed; the first process keeps them.

        Raises:
            ParedError: a file of one is missing or damaged.
        """
        self._ledger.take_up(record)
        for members in self._ledger.found.units.values():
            self.note(members, 0)

    def hand_over(self) -> None:
        """Let the first process keep, beside its own, what the others have decomposed."""
        store = self._ledger.store
        new = [] if self._processes.is_first else store.new()
        for copies in self._processes.to_first([(name, store.copy(name)) for name in new]):
            for name, copy in copies:
                store.write(name, copy)

    def decided(self, plan: Plan) -> list[tuple[Unit, LowRank]]:
        """Return the units that a plan gives a rank, with it."""
        planned = ranks_of(plan) | ranks_of_narrow(plan)
        return [(unit, planned[unit.name]) for unit in self if unit.name in planned and unit.name in self.spectra]

    def installer(self, plan: Plan) -> Callable[[int], None]:
        """Return what puts the factors of all units in place whose last block is that of an index."""
        decided = self.decided(plan)
        last = {unit.name: max(site.block for site in unit.members) for unit, _ in decided}

        def install(index: int) -> None:
            self.install([(unit, decision) for unit, decision in decided if last[unit.name] == index])

        return install

    def install(self, chosen: Sequence[tuple[Unit, LowRank]]) -> None:
        """Put the factors of units in place, each made by the process that keeps the decomposition."""

        def make(one: tuple[Unit, LowRank]) -> Installed:
            unit, decision = one
            factors = factors_made(self._model, unit, self._ledger.store.get(unit.name, self._weight(unit)), decision)
            give_back()
            return factors

        for names, modules in self._processes.each(chosen, make, lambda one: self._owners[one[0].name]):
            put_there(self._model, names, modules)

    @contextmanager
    def installed(self, decisions: Mapping[str, Decision], store: BlockStore | None = None) -> Iterator[None]:
        """Have these decisions, by unit, in the model for the length of a ``with`` block; the rest is as it was.

        Args:
            decisions: by unit.
            store: of the model, where its blocks are not in memory: they are changed as they are read.

        Raises:
            ParedError: they are read one by one, and a decision is of several blocks.
        """
        chosen = [(unit, decisions.get(unit.name)) for unit in self]
        taken = [(unit, decision) for unit, decision in chosen if isinstance(decision, LowRank)]
        if store is not None and not isinstance(store, ResidentBlocks):
            with cast("LazyBlocks", store).patched(self._changes(taken)):
                yield
            return
        with unchanged(self._model, [site.name for unit, _ in taken for site in unit.members]):
            self.install(taken)
            yield

    def _changes(self, taken: Sequence[tuple[Unit, LowRank]]) -> Callable[[int], None]:
        """Return what installs decisions in a block, by its index."""
        of_block: dict[int, list[tuple[Unit, LowRank]]] = {}
        for unit, decision in taken:
            if len({site.block for site in unit.members}) > 1:
                raise ParedError(
                    f"unit {unit.name} shares a basis over several blocks, which cannot be tried on a model that is "
                    "read block by block; take sharing=none, another allocation, or keep it in memory "
                    f"({called('stream', 'off')})"
                )
            of_block.setdefault(unit.members[0].block, []).append((unit, decision))

        def change(index: int) -> None:
            self.install(of_block.get(index, ()))

        return change

    def factors(self, unit: Unit, rank: int) -> Factors:
        """Return the factors of a unit that is kept here with its dense weight, in the dtype of that."""
        W_ON = self._ledger.store.weight(unit.name, slice(0, unit.out_features))
        found = self._ledger.store.get(unit.name, W_ON).factors(rank)
        return Factors(*(part.to(W_ON.dtype) for part in found))

    def owner_of(self, site: str) -> int:
        """Return the rank of the process that keeps the dense weight of a site."""
        return self._owners[self._rows[site][0]]

    def dense_weight(self, site: str) -> torch.Tensor:
        """Return the dense weight ``(out, in)`` of a member of a unit kept here; no more of the unit is read."""
        return self._ledger.store.weight(*self._rows[site])

    def _weight(self, unit: Unit) -> torch.Tensor:
        return stacked([weight_of(self._model.get_submodule(site.name)).detach() for site in unit.members])


def factors_made(model: nn.Module, unit: Unit, found: Decomposition, decision: LowRank) -> Installed:
    """Return the names of a unit's layers, and what takes their places."""
    names = [site.name for site in unit.members]
    return names, list(made(model, names, found.factors(decision.rank), decision.pivoted))


def put_there(model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
    """Put what this process or another has made in the place of layers, on the devices of those."""
    for name, module in zip(names, modules, strict=True):
        module.to(next(model.get_submodule(name).parameters()).device)
    put(model, names, modules)


def ranks_of(plan: Plan) -> dict[str, LowRank]:
    """Return the ranks of a plan by unit: a shared basis's by the name of its owner."""
    ranks: dict[str, LowRank] = {}
    for site in plan.sites:
        decision = site.decision
        if isinstance(decision, Shared) and decision.owner == site.name:
            ranks[site.name] = LowRank(rank=decision.rank, pivoted=decision.pivoted)
        elif isinstance(decision, LowRank):
            ranks[site.name] = decision
    return ranks


def ranks_of_narrow(plan: Plan) -> dict[str, LowRank]:
    """Return the ranks that layers are given before they lose channels, by site.

    Pivots are inputs, so those of a layer that loses inputs are chosen when it has.
    """
    return {
        site.name: LowRank(rank=site.decision.rank, pivoted=site.decision.pivoted and site.decision.side == "out")
        for site in plan.sites
        if isinstance(site.decision, Width) and site.decision.rank is not None
    }
