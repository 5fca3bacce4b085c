"""What the hooks of the probe pass write down."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pared.errors import ParedError
from pared.structure.calls import BlockCall, hidden_of
from pared.structure.linear import LINEAR_TYPES
from pared.structure.model import Anatomy, Site
from pared.structure.proof import fault_of_call


class Watch:
    """Sees a pass go by.

    Attributes:
        order: indices of the blocks as they ran.
        calls: how each was called.
        hidden: what each read, copied, if that is to be kept.
        outputs: what each output, copied likewise.
    """

    def __init__(self, anatomy: Anatomy, keep: bool) -> None:
        self.anatomy, self.keep = anatomy, keep
        self.order: list[int] = []
        self.calls: list[BlockCall] = []
        self.hidden: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._fault: ParedError | None = None
        self._previous: torch.Tensor | None = None
        self._version = 0
        self._left = 0  # how many runs of blocks are over
        self._open = False  # whether the block that runs was called as a block is
        self._reads: dict[str, list[int]] = {}  # site, in the order they run -> numbers of the tensors it read
        self._alive: dict[tuple[int, ...], tuple[torch.Tensor, int]] = {}  # holds tensors: no address is used twice
        self._tensors = 0
        self._not_linear: dict[str, str] = {}
        self._own: set[str] = set()  # layers whose class does not say everything: only a pass can prove them

    def hooked(self, model: nn.Module, blocks: list[nn.Module]) -> Iterator[Any]:
        """Hook every block and every linear layer."""
        for index, block in enumerate(blocks):
            yield block.register_forward_pre_hook(self._enter(index), with_kwargs=True)
            yield block.register_forward_hook(self._leave)
        sites = {site.name for site in self.anatomy.sites}
        for site in self.anatomy.layers:
            module = model.get_submodule(site.name)
            if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
                self._own.add(site.name)
            yield module.register_forward_pre_hook(self._read(site.name))
            if site.name in sites and isinstance(module, LINEAR_TYPES):  # not what has taken the place of one already
                yield module.register_forward_hook(self._put_out(site.name), with_kwargs=True)

    def _enter(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name, before = self.anatomy.block_name(index), self._previous
            self.order.append(index)
            self._alive.clear()
            self._open = False
            try:
                call = BlockCall.seen(args, kwargs, name, index)
            except ParedError as error:
                self._fault = self._fault or error
                return
            if before is not None and not self._same(call.hidden, before):
                self._fault = self._fault or ParedError(
                    f"block {name} does not read the output of the block before it; blocks with other wiring between "
                    "them are not supported"
                )
            self._open = True
            self.calls.append(call)
            if self.keep:
                self.hidden.append(call.hidden.detach().clone())

        return hook

    def _same(self, hidden: torch.Tensor, before: torch.Tensor) -> bool:
        if before._version != self._version:  # changed in place
            return False
        return hidden is before or (not hidden.is_meta and torch.equal(hidden, before))

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self._left += 1
        self._previous = hidden_of(output)
        self._version = self._previous._version  # moves when it is changed in place
        if self._open:
            entries = len(output) if isinstance(output, (tuple, list)) else 0
            self.calls[-1] = replace(self.calls[-1], returns=entries)
            if self.keep:
                self.outputs.append(self._previous.detach().clone())

    def _read(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], torch.Tensor):
                return
            seen = args[0]
            storage = seen.untyped_storage()
            place = storage.data_ptr() or storage._cdata  # there is no address on the meta device
            key = (place, int(seen.storage_offset()), seen.numel(), seen.shape[-1], seen._version)
            if key not in self._alive:
                self._alive[key] = (seen, self._tensors)
                self._tensors += 1
            self._reads.setdefault(name, []).append(self._alive[key][1])

        return hook

    def _put_out(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in self._not_linear and (fault := fault_of_call(module, args, kwargs, output)):
                self._not_linear[name] = fault

        return hook

    def is_complete(self, blocks: int) -> bool:
        """Whether every block ran, and ran to its end."""
        return set(self.order) == set(range(blocks)) and self._left == len(self.order)

    def require_chain(self, blocks: int, failed: ParedError | None) -> None:
        """Refuse what cannot be calibrated block by block.

        Args:
            blocks: how many there are.
            failed: what ended the pass before its blocks were through.

        Raises:
            ParedError: says how the blocks ran.
        """
        if self._fault is not None or failed is not None:
            raise self._fault or failed  # type: ignore[misc]
        path = self.anatomy.blocks_path
        if not self.order:
            raise ParedError(
                f"the blocks of {path} are not run on text, so nothing can be calibrated on it; use a "
                "data-free method (svd, magnitude, with uniform allocation)"
            )
        if self.order != sorted(self.order) or set(self.order) != set(range(blocks)):
            shown = ", ".join(map(str, self.order[:8])) + (", ..." if len(self.order) > 8 else "")
            raise ParedError(
                f"the {blocks} blocks of {path} ran in the order [{shown}], not each one or more times in a row, from "
                "first to last; only data-free methods (svd, magnitude, with uniform allocation) can be used"
            )

    def without_faults(self, anatomy: Anatomy) -> Anatomy:
        """Return an anatomy without the sites that were seen to be no linear layers.

        Raises:
            ParedError: none is left.
        """
        left = anatomy.leaving(self._not_linear)
        if not left.sites:
            name, why = next(iter(self._not_linear.items()))
            raise ParedError(f"no linear layer inside the blocks of {anatomy.blocks_path}: {name}: {why}")
        return left

    def result(self) -> Anatomy:
        """Return the anatomy with what was seen.

        Raises:
            ParedError: no site is left.
        """
        anatomy, runs = self.without_faults(self.anatomy), Counter(self.order)
        turns = {name: turn for turn, name in enumerate(self._reads)}
        first: dict[tuple[int, ...], str] = {}
        positions: Counter[str] = Counter()
        found: dict[str, Site] = {}
        for site in sorted(anatomy.layers, key=lambda site: (site.block, turns.get(site.name, len(turns)))):
            seen, times = tuple(self._reads.get(site.name, ())), max(runs[site.block], 1)
            # One that runs again inside its block shares its input with none: a Gram must see every read once.
            leader = first.setdefault(seen, site.name) if len(seen) == times else site.name
            idle = not seen and site.name in self._own
            place = positions[site.parent]
            found[site.name] = replace(site, reads=leader, seen=bool(seen), idle=idle, position=place)
            positions[site.parent] += 1
        return anatomy.with_layers(found[layer.name] for layer in anatomy.layers)
