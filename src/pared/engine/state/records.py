"""What of one compression outlives its process: which blocks every pass has finished, and the plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared.engine.spec import CompressionSpec, PassSpec
from pared.engine.state.pass_record import PassRecord
from pared.engine.state.run_state import CompressionRun
from pared.engine.state.shared_record import SharedRecord
from pared.processes import Processes
from pared.schema.plan import Plan
from pared.structure import Anatomy
from pared.structure.store import BlockStore

Kept = PassRecord | SharedRecord
Order = Callable[[Any], None]  # sends something to the other processes, which do it at the same time


@dataclass(frozen=True)
class Records:
    """Keeps in one state what several processes make, and gives all of them what an earlier job kept.

    Attributes:
        store: hands out the blocks.
        anatomy: of the model.
        spec: the resolved compression.
        state: that is kept, in the first process; None if nothing is.
        processes: that compress together.
    """

    store: BlockStore
    anatomy: Anatomy
    spec: CompressionSpec
    state: CompressionRun | None
    processes: Processes

    def of_pass(
        self,
        step: PassSpec,
        number: int,
        tables: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
        written: Callable[[], list[Path]] = list,
    ) -> Kept | None:
        """Return the record of a pass; none if nothing is kept, by the first process where there are several.

        Args:
            step: the pass.
            number: of it.
            tables: as of :class:`PassRecord`.
            written: as of :class:`PassRecord`.
        """
        own = None
        if self.state is not None:
            own = PassRecord(
                self.state,
                self.store,
                number,
                tables,
                written=written,
                changes=step.changes,
                group=self.spec.group_of(step),
                replaces=step.replaces,
            )
        if self.processes.count == 1 or not self.processes.agreed(own is not None):
            return own
        return SharedRecord(own, self.processes, self.store, self.anatomy, step.changes)

    def plan(self, decide: Callable[[Order], Plan], fallbacks: dict[str, str], follow: Order = lambda _: None) -> Plan:
        """Return the plan that the first process, or one that was killed, has decided; decide it and keep it if not.

        Args:
            decide: makes the plan; is given what lets the other processes follow.
            fallbacks: what stood in for what said nothing, by unit; grows by what the decision finds.
            follow: what those do with what they are sent.
        """

        def first(order: Order) -> tuple[Plan, dict[str, str]]:
            if self.state is None:
                return decide(order), fallbacks
            if self.state.get("plan") is None:
                plan = decide(order)
                self.state.put("plan", {"plan": plan.model_dump(mode="json"), "fallbacks": dict(fallbacks)})
            found = self.state.get("plan")
            return Plan.model_validate(found["plan"]), found["fallbacks"]

        plan, found = self.processes.led(first, follow)
        fallbacks |= found
        return plan

    @property
    def has_plan(self) -> bool:
        """Whether a process that was killed has decided the plan."""
        return self.processes.agreed(self.state is not None and self.state.get("plan") is not None)


def is_done(kept: Kept | None) -> bool:
    """Whether an earlier process has finished a pass; the blocks are then what it made of them."""
    if kept is None or not kept.complete:
        return False
    for index in kept.blocks:
        kept.restore(index)
    return True
