"""Training every compressed block, behind those already trained, to output what the dense block outputs.

Losses of single layers do not see how errors meet inside a block and add up over blocks. Here a block reads what the
compressed model really gives it, and its targets are what the dense block outputs in the dense model: so it also makes
up for errors of the blocks before it. Only what is stored is trained: as many parameters as before, zeros stay zeros.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pared.calibration import BlockInputs, BlockStatistics, DenseReference
from pared.calibration.norms import gains_of_next
from pared.calibration.spool import HiddenStates
from pared.engine.blocks import run_blocks
from pared.engine.observe import Observer
from pared.engine.spec import PassSpec
from pared.engine.state.pass_record import Tables
from pared.engine.state.records import Kept, is_done
from pared.errors import ParedError
from pared.modules import SparseLinear, replace_parameter
from pared.modules.shared import DOWN, BasisHolder
from pared.names import called
from pared.schema.manifest import Refined
from pared.schema.recipe import Refinement
from pared.structure import Anatomy
from pared.structure.state import KeptState, copy_block
from pared.structure.store import DenseBlocks

HELD_OUT = 8  # of so many batches one is never trained on
PATIENCE = 2  # epochs that bring nothing, one after the other, end a training
WARM_UP = 0.1  # of the steps, in which Adam comes to know the gradients
SLOWER = 8.0  # a block that gained nothing is trained again from where it began, at a rate so many times lower
TRIES = 3  # rates in all
DIVERGED = 1.5  # times the error of before, after an epoch: this rate will not gain
State = dict[str, torch.Tensor]  # by the name of a parameter in its block


def refine(observer: Observer, step: PassSpec, number: int, dense: DenseBlocks) -> tuple[Refined, ...]:
    """Train every block of a compressed model, or those that an earlier process has not.

    Hidden states, parameters and what is held out are computed in float32, products of a step in bfloat16 where
    calibration is. Memory besides the model: the hidden states of both paths, one block of each, what Adam
    keeps of one, and the graph of one batch through it.

    Args:
        observer: that has read the tokens.
        step: the pass.
        number: of it.
        dense: hands out the blocks of the dense model.

    Returns:
        What came of every block, in order.

    Raises:
        ParedError: hidden states are not finite.
    """
    config = observer.spec.refine
    assert config is not None
    found: dict[int, Refined] = {}

    def tables() -> Tables:
        return {"refined": {str(index): one.model_dump() for index, one in found.items()}}

    kept = observer.records.of_pass(step, number, tables)
    if kept is not None:
        before = kept.found().get("refined", {})
        found |= {int(index): Refined.model_validate(one) for index, one in before.items()}
    if is_done(kept):
        return _in_order(found)
    with observer.watch("refine"), observer.progress.stage("refine", len(observer.store), "block") as advance:
        _run(observer, step, config, dense, kept, found, advance)
    wrong = [one for one in found.values() if one.before > 0]
    if wrong and not any(one.epochs for one in wrong):
        observer.progress.note(
            f"refining made no block better on what was held out, at learning rates from {config.lr:g} to "
            f"{config.lr / SLOWER ** (TRIES - 1):g}: blocks are as they were compressed; give more text "
            f"({called('samples')}), or leave refine out"
        )
    return _in_order(found)


def _in_order(found: Mapping[int, Refined]) -> tuple[Refined, ...]:
    return tuple(found[index] for index in sorted(found))


def _run(
    observer: Observer,
    step: PassSpec,
    config: Refinement,
    dense: DenseBlocks,
    kept: Kept | None,
    found: dict[int, Refined],
    advance: Callable[[], None],
) -> None:
    """Visit the blocks that are left; with several processes the first trains, and the others are given the result."""
    inputs = observer.capture_to_train(config.batch)
    trains, store, anatomy = observer.processes.is_first, observer.store, observer.anatomy
    gains = gains_of_next(observer.model, anatomy, inputs, dense) if trains else []
    reference = DenseReference(inputs.hidden.clone(), dense)
    for _ in found:
        advance()

    def visit(statistics: BlockStatistics) -> None:
        index = statistics.index
        block = store.load(index)
        new: tuple[State, Refined] | None = None
        if trains:
            name = anatomy.block_name(index)
            trained = trained_names(block, anatomy, index, observer.model)
            seed = observer.spec.calibration.seed + index
            half = observer.dtype == torch.bfloat16
            training = BlockTraining(block, trained, index, inputs, reference.hidden, gains[index], config, seed, half)
            new = training.run(name)
        new = observer.processes.agreed(new)
        assert new is not None
        found[index] = new[1]
        for name, values in new[0].items():  # the dense block may have the parameter that was there
            replace_parameter(block, name, values)
        advance()

    run_blocks(
        store,
        anatomy,
        inputs,
        None,
        visit,
        hand_on=step.hand_on,
        changes=step.changes,
        reference=reference,
        kept=kept,
    )


def trained_names(block: nn.Module, anatomy: Anatomy, index: int, model: nn.Module) -> list[str]:
    """Return the names of the parameters of a block that are trained.

    Those are what its sites hold, compressed or left dense, and weights of single features (gains, biases). A basis
    that other blocks have too, and whatever else is tied to something outside of the block, is not changed.
    """
    own = {id(parameter) for parameter in block.parameters()}
    inside = {id(module) for module in block.modules()}
    tied = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module._parameters.values()
        if parameter is not None and id(parameter) in own
    }
    sites = {anatomy.path_in_block(site) for site in anatomy.sites_of(index) if not site.idle}
    prefix = f"{anatomy.block_name(index)}."
    others = {layer.name.removeprefix(prefix) for layer in anatomy.layers if layer.block == index} - sites
    names = []
    for name, parameter in block.named_parameters():
        if id(parameter) in tied or _is_shared(block, name):
            continue
        is_site = any(name.startswith(f"{site}.") or site == "" for site in sites)
        is_other = any(name.startswith(f"{layer}.") for layer in others)  # skipped, or not reached by a token
        if is_site or (parameter.ndim == 1 and not is_other):
            names.append(name)
    return names


def _is_shared(block: nn.Module, name: str) -> bool:
    """Whether a parameter is a basis that several layers have."""
    if not name.endswith(DOWN):
        return False
    owner = block.get_submodule(name.removesuffix(DOWN))
    return isinstance(owner, BasisHolder) and owner.shares is not None


class BlockTraining:
    """The training of one block.

    Args:
        block: compressed; not changed.
        trained: names of its parameters that are.
        index: of it.
        inputs: what it reads.
        targets: what the dense block outputs, by batch.
        gain: weights of the features of the output ``(width,)``, for the loss that takes them.
        config: how it is trained.
        seed: of the order of batches.
        half: whether products of a step are computed in bfloat16; what is held out is measured in float32.
    """

    def __init__(
        self,
        block: nn.Module,
        trained: list[str],
        index: int,
        inputs: BlockInputs,
        targets: HiddenStates | list[torch.Tensor],
        gain: torch.Tensor,
        config: Refinement,
        seed: int,
        half: bool = False,
    ) -> None:
        self._block = block
        self._stored = {name: block.get_parameter(name).dtype for name in trained}
        self._worker = copy_block(block).to(device=inputs.device, dtype=inputs.dtype).requires_grad_(False)
        self._parameters = {name: self._worker.get_parameter(name).requires_grad_() for name in trained}
        self._masks = {
            f"{path}.weight": module.mask
            for path, module in self._worker.named_modules()
            if isinstance(module, SparseLinear) and f"{path}.weight" in self._parameters
        }
        self._index, self._inputs, self._targets, self._config, self._seed = index, inputs, targets, config, seed
        self._half = half
        weights = gain.square() if config.loss == "next-norm" else torch.ones_like(gain)
        mean = weights.mean()
        self._weights = weights / mean if bool(mean > 0) else torch.ones_like(weights)
        count = len(inputs.calls)
        self._held = [number for number in range(count) if number % HELD_OUT == HELD_OUT - 1] or [count - 1]
        self._train = [number for number in range(count) if number not in self._held]
        self._state = KeptState([self._worker])

    def run(self, name: str) -> tuple[State, Refined]:
        """Train, and return the parameters that are best on what was held out, as stored; none if those of before are.

        At a rate that is too high for it a block becomes worse: it is trained again at lower ones.

        Raises:
            ParedError: the block, or the dense one, outputs NaN or infinity.
        """
        before = self._measure()
        if not math.isfinite(before):
            raise ParedError(f"block {name} outputs NaN or infinity, or the dense one does; check its weights")
        for attempt in range(TRIES if before > 0 else 0):
            state, best, epochs = self._run_at(self._config.lr / SLOWER**attempt, before)
            if state:
                return state, Refined(name=name, before=before, after=best, epochs=epochs)
            with torch.no_grad():
                for own, parameter in self._parameters.items():
                    parameter.copy_(self._block.get_parameter(own))
        return {}, Refined(name=name, before=before, after=before, epochs=0)

    def _run_at(self, rate: float, before: float) -> tuple[State, float, int]:
        """Train at a learning rate; return the best parameters, if better than before, their error and their epoch."""
        state: State = {}
        best, epochs, idle = before, 0, 0
        order, steps = torch.Generator().manual_seed(self._seed), self._config.epochs * len(self._train)
        adam = torch.optim.Adam(self._parameters.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share_of_step(step, steps))
        for epoch in range(self._config.epochs):
            for place in torch.randperm(len(self._train), generator=order).tolist():
                self._step(adam, self._train[place])
                schedule.step()
            rounded = self._rounded()
            now = self._measured_with(rounded)
            if now < best:
                best, state, epochs, idle = now, rounded, epoch + 1, 0
            elif (idle := idle + 1) == PATIENCE or not now < DIVERGED * before:
                break
        return state, best, epochs

    def _step(self, adam: torch.optim.Optimizer, number: int) -> None:
        adam.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with torch.autocast(self._inputs.device.type, torch.bfloat16, enabled=self._half):
                loss = self._loss(number)
            torch.autograd.backward(loss)
        for name, mask in self._masks.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)
        adam.step()

    def _loss(self, number: int) -> torch.Tensor:
        """Return the mean over tokens of the squared error of a batch, relative to the target's mean square."""
        error = relative_error(self._output(number), self._targets[number], self._weights)
        mask = self._inputs.mask(number)
        return error.mean() if mask is None else error[mask].mean()

    def _output(self, number: int) -> torch.Tensor:
        """Return what the block makes of a batch."""
        hidden = self._inputs.hidden[number].clone()  # a block may change its input in place
        for call in self._inputs.calls_of(number, self._index):
            hidden = call.run(self._worker, hidden)
            self._state.restore()
        return hidden

    @torch.no_grad()
    def _measure(self) -> float:
        """Return the mean error on what is held out."""
        return math.fsum(float(self._loss(number)) for number in self._held) / len(self._held)

    def _rounded(self) -> State:
        """Return copies of the parameters as they are stored."""
        return {
            name: parameter.detach().to(self._stored[name], copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def _measured_with(self, state: State) -> float:
        """Return the error with parameters as they are stored; training continues with the unrounded ones."""
        if all(tensor.dtype == self._parameters[name].dtype for name, tensor in state.items()):
            return self._measure()
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])
        found = self._measure()
        for name, parameter in self._parameters.items():
            parameter.copy_(own[name])
        return found


def relative_error(found: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the squared error of every token, relative to its target's mean square, ``(..., 1)``.

    Args:
        found: ``(..., width)``.
        target: of the same shape.
        weights: of the features ``(width,)``.
    """
    size = target.square().mean(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    return ((found - target).square() * weights).mean(-1, keepdim=True) / size


def _share_of_step(step: int, steps: int) -> float:
    """Return which share of the learning rate a step takes: rising at first, then falling towards 0."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm + 1)
