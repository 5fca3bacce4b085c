"""The statistics a low-rank method reads, from whatever runs it takes: a folder, a forward pass, a backward pass."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from pared.calibration import BlockInputs, BlockStatistics
from pared.calibration.cache import require_fits as require_saved
from pared.engine.blocks import Needs, Visit
from pared.engine.observe import Observer
from pared.engine.spec import LowRankSpec, PassSpec
from pared.engine.state.records import Kept, is_done
from pared.engine.statistics.collect import source_of
from pared.engine.statistics.spool import StatisticsSpool
from pared.errors import ParedError
from pared.lowrank.registry import nothing
from pared.structure.store import ResidentBlocks

Saved = Callable[[], Iterator[BlockStatistics]]


class MethodStatistics:
    """Runs what a low-rank method has to have run, and hands every block's statistics to a visit.

    Between passes it keeps what a later one needs of the dense model's gradients.
    """

    def __init__(self, observer: Observer, spec: LowRankSpec, saved: Saved | None = None) -> None:
        """Start.

        Args:
            observer: that has probed the model, and read the tokens if there are any.
            spec: the resolved compression.
            saved: statistics that were saved, in place of the first pass over the dense model, which is there still.

        Raises:
            ParedError: those are of another model or other tokens, or a block is lacking.
        """
        self._observer, self._spec, self._saved = observer, spec, saved
        self._gradients = StatisticsSpool(  # of the dense model
            observer.memory, not isinstance(observer.store, ResidentBlocks) and observer.memory.limit is not None
        )
        if saved is not None and spec.calibrated:
            require_saved(saved(), source_of(observer, bool(spec.gradients)))

    def run(self, step: PassSpec, visit: Visit, influence: bool = False, kept: Kept | None = None) -> None:
        """Collect what the method reads, and visit every block with the statistics of its sites.

        Args:
            step: a solve; says what runs, and whether visits change blocks.
            visit: is given every block once, in the model's order or from the last to the first.
            influence: measure how much every block changes the hidden states.
            kept: the record of the pass; blocks that it holds are not visited.
        """
        observer, spec = self._observer, self._spec
        behind, names = step.hand_on == "compressed", spec.gradients
        if step.runs == "nothing":
            observer.without_data(visit, step.installs, kept)
            return
        if is_done(kept) and not (names and spec.sequential and not behind):
            return
        inputs = observer.capture()
        if self._saved is not None and not behind:
            self._from_saved(self._saved(), visit, step.installs)
            return
        needs: Needs = spec.requires
        if step.runs == "backward":
            self._run_backward(inputs, names | needs([(1, 1)]), visit, step, kept)
            return
        if step.runs == "backward, then forward" and not self._gradients:
            needs = self._collect_gradients(inputs, needs, forward=behind or spec.gradient_share < 1)
        reference = observer.reference(inputs) if step.reference else None
        if reference is not None:
            needs = self._with_input_gram(needs)

        def visit_with_gradients(block: BlockStatistics) -> None:
            sites = [site.name for site in observer.anatomy.sites_of(block.index)]
            visit(replace(block, statistics={name: {**self._gradients.of(name), **block.take(name)} for name in sites}))

        observer.forward(inputs, needs, visit_with_gradients, step, reference, influence=influence, kept=kept)
        self._gradients.drop_all_but(names if spec.sequential and not behind else frozenset())

    def _collect_gradients(self, inputs: BlockInputs, needs: Needs, forward: bool) -> Needs:
        """Keep the gradients of all blocks, and return what is left to collect of the forward pass.

        Args:
            inputs: of the first block.
            needs: of the method, beside gradients.
            forward: whether those are to be collected of a forward pass of their own.
        """
        names = self._spec.gradients
        if self._saved is not None:
            for block in self._saved():
                self._gradients.keep(block, names, stored=True)
        else:
            read = names if forward else names | needs([(1, 1)])
            self._observer.backward(
                inputs, read, lambda block: self._gradients.keep(block, read), self._spec.gradient_share
            )
        return needs if forward else nothing

    def _run_backward(
        self, inputs: BlockInputs, names: frozenset[str], visit: Visit, step: PassSpec, kept: Kept | None
    ) -> None:
        """Visit every block with statistics of the backward pass, and keep what a second pass needs of them."""

        def keep_and_visit(block: BlockStatistics) -> None:
            self._keep(block)
            if kept is None or not kept.holds(block.index):
                with self._gradients.set_aside(block) as found:
                    visit(found)

        share = self._spec.gradient_share
        self._observer.backward(inputs, names, keep_and_visit, share, changes=step.installs, kept=kept)

    def _from_saved(self, blocks: Iterator[BlockStatistics], visit: Visit, changes: bool) -> None:
        """Visit every block with the statistics that were saved of it."""

        def visit_saved(_: BlockStatistics) -> None:
            there = next(blocks, None)
            if there is None:
                raise ParedError("the collected statistics came to an end; give what can be read more than once")
            self._keep(there)
            visit(replace(there, statistics=dict(there.statistics)))  # a visit uses them up; they may be given again

        self._observer.without_data(visit_saved, changes)

    def _keep(self, block: BlockStatistics) -> None:
        """Keep what a second pass, behind compressed blocks, needs of the dense model's gradients."""
        if self._spec.sequential:
            self._gradients.keep(block, self._spec.gradients, stored=self._saved is not None)

    def _with_input_gram(self, needs: Needs) -> Needs:
        """Return the needs with the input Gram in place of that of outputs, as targets are made from both paths."""
        gram = self._spec.method.input_gram
        return lambda shapes: needs(shapes) - {"output_gram"} | {gram}
