"""Whether experts can be taken out of a block: proved by running it, as channels are (:mod:`pared.structure.channels`).

What is proved, on what the block read in the probe pass and on random hidden states, in float32 or better:

- What the experts make of a token is the sum of what each picked one makes of it, times its weight.
- With some experts alone the module gives, for picks among these, what it gave before.
- A router that knows some alone picks, for every token whose picks are among these, the same with weights in the same
  proportions; where others were picked too it keeps those that it knows.
- The block with some experts alone gives what it gives where all are there and the router knows these alone.

A block of half precision is copied for that to float32, where scores of experts do not tie by rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import nn

from pared.structure.calls import BlockCall, adapted
from pared.structure.groups import Count, RefusedError
from pared.structure.mixture import Mixture, Placed, Routed, seen_as
from pared.structure.probe import hooks
from pared.structure.proof import TOLERANCE
from pared.structure.state import KeptState, copy_block

MOST_COUNTS = 8  # attributes of which every subset is tried
DRAWS = 3  # random hidden states that a block is tried on, besides those of the probe pass


@torch.no_grad()
def proved(mixture: Mixture, block: nn.Module, name: str, call: BlockCall) -> Mixture:
    """Return a mixture with what running its block tells of it.

    Args:
        mixture: as shapes tell it.
        block: in evaluation mode; it is as before afterwards.
        name: of the block.
        call: how it was called in the probe pass.

    Raises:
        RefusedError: experts cannot be taken out of it; says why.
        ParedError: it is of half precision and cannot be copied.
    """
    if call.hidden.dtype.itemsize < torch.float32.itemsize:  # where logits of a router may be equal by rounding
        block = copy_block(block, name).float()
        hidden = call.hidden.float()
        call = replace(adapted(call, torch.float32, hidden.device, {}), hidden=hidden)
    placed = Placed(mixture, block, name)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(call.hidden.shape, generator=generator).to(call.hidden) for _ in range(DRAWS)]
    scale = call.hidden.float().std().to(call.hidden)
    inputs = [call.hidden, *(one * scale for one in drawn)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        state = KeptState([block])  # as it is now: some experts may be gone for a while
        try:
            return call.run(block, hidden.clone())
        finally:
            state.restore()

    seen = [_seen(placed, run, hidden) for hidden in inputs]
    picked = seen[0][1].picks[0].shape[1]
    if picked >= mixture.experts:
        raise RefusedError(f"every token is given to all of its {picked} experts")
    for _, routed, output in seen:
        _require_sum(placed, routed, output)
    kept_K = next(_kept(seen[1][1].picks[0], mixture.experts))
    # First of all, as nothing else runs with fewer experts where a width happens to be the same number.
    mixture = seen_as(mixture, _counts(placed, run, inputs, kept_K), picked, False)
    placed = Placed(mixture, block, name)
    for _, routed, _ in seen:
        _require_sliced(placed, routed, generator)
    rescales = False
    for root, routed, _ in seen[1:]:  # tokens of the probe may have ties, as where all that is read is zero
        for kept_K in _kept(routed.picks[0], mixture.experts):
            rescales |= _rescales(placed, root, routed, kept_K)
    return seen_as(mixture, mixture.counts, picked, rescales)


RootCall = tuple[tuple[Any, ...], dict[str, Any]]


def _seen(
    placed: Placed, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> tuple[RootCall, Routed, torch.Tensor]:
    """Return how root and experts are called where a block reads this, and what the experts return."""
    roots: list[RootCall] = []
    calls: list[tuple[Routed, Any]] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        roots.append((args, kwargs))

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((Routed.seen(args, kwargs), output))

    with hooks(
        [
            placed.root.register_forward_pre_hook(enter, with_kwargs=True),
            placed.experts.register_forward_hook(leave, with_kwargs=True),
        ]
    ):
        run(hidden)
    if len(calls) != 1 or len(roots) != 1:
        raise RefusedError("its experts do not run once in their block on the tokens of the probe pass")
    (routed, output) = calls[0]
    if not isinstance(output, torch.Tensor) or output.shape[:-1].numel() != len(routed.picks[0]):
        raise RefusedError("its experts do not return a row for every token")
    return roots[0], routed, output


def _require_sum(placed: Placed, routed: Routed, output: torch.Tensor) -> None:
    index, weights = routed.picks
    hidden, total = routed[routed.hidden], torch.zeros_like(output, dtype=torch.float64)
    for place in range(index.shape[1]):
        one, part = index[:, place : place + 1], weights[:, place : place + 1]
        made = routed.run(placed.experts, hidden, one, torch.ones_like(part))
        total += (made.double() * part.double()).view_as(total)
    _require_close(total, output, "what its experts make of a token is not their weighted sum")


def _require_sliced(placed: Placed, routed: Routed, generator: torch.Generator) -> None:
    index, weights = routed.picks
    experts = placed.mixture.experts
    kept_K = torch.arange(0, experts, 2) if experts > 2 else torch.tensor([1])
    drawn = torch.rand(len(index), len(kept_K), generator=generator).argsort(dim=1)
    count = min(index.shape[1], len(kept_K))
    some, part, hidden = drawn[:, :count].to(index.device), weights[:, :count], routed[routed.hidden]
    expected = routed.run(placed.experts, hidden, kept_K.to(index.device)[some], part)
    try:
        with placed.keeping(kept_K):
            found = routed.run(placed.experts, hidden, some, part)
    except Exception as error:  # whatever a size that is not the configuration's leads to
        text = " ".join(str(error).split())[:120]
        raise RefusedError(f"its experts do not run with fewer ({type(error).__name__}: {text})") from None
    _require_close(found, expected, "its experts compute something else with fewer")


def _kept(index: torch.Tensor, experts: int) -> Iterator[torch.Tensor]:
    """Yield experts that stay: all that one token was given to, and every other one of the rest."""
    for own in torch.unique(index.long().sort(dim=1).values, dim=0).cpu():
        rest = torch.tensor([one for one in range(experts) if one not in own.tolist()])
        yield torch.cat([own.unique(), rest[1::2]]).sort().values


def _rescales(placed: Placed, root: RootCall, routed: Routed, kept_K: torch.Tensor) -> bool:
    """Whether weights change where picks do not, if the router knows some experts alone.

    Raises:
        RefusedError: it picks others than before among those it knows, or weighs them otherwise.
    """
    index, weights = routed.picks
    try:
        other, others = placed.rerouted(kept_K, *root)
    except RefusedError:
        raise
    except Exception as error:  # whatever a size that is not the configuration's leads to
        text = " ".join(str(error).split())[:120]
        raise RefusedError(f"its router does not run with fewer experts ({type(error).__name__}: {text})") from None
    if other.shape != index.shape:
        raise RefusedError(f"its router picks {other.shape[-1]} of fewer experts, and {index.shape[-1]} of all")
    experts, dtype = placed.mixture.experts, torch.float64
    before, after = (torch.zeros(len(index), experts, dtype=dtype, device=index.device) for _ in range(2))
    before.scatter_(1, index.long(), weights.to(dtype))
    after.scatter_(1, other.long(), others.to(dtype))
    known = torch.zeros(experts, dtype=torch.bool, device=index.device)
    known[kept_K.to(index.device)] = True
    picked, now = (torch.zeros_like(before, dtype=torch.bool) for _ in range(2))
    picked.scatter_(1, index.long(), True)
    now.scatter_(1, other.long(), True)
    if bool((now.sum(dim=1) != index.shape[1]).any()) or bool((picked & known & ~now).any()):
        raise RefusedError("its router picks others of the experts that stay where some are gone (as from groups)")
    same = (picked & known).sum(dim=1) == index.shape[1]
    before, after = before[same], after[same]
    ratios = after.sum(dim=1, keepdim=True) / before.sum(dim=1, keepdim=True)
    _require_close(after, before * ratios, "its router weighs experts otherwise where others are gone", weights.dtype)
    return not _is_close(after, before, weights.dtype)


def _counts(
    placed: Placed, run: Callable[[torch.Tensor], torch.Tensor], inputs: Sequence[torch.Tensor], kept_K: torch.Tensor
) -> tuple[Count, ...]:
    """Return the most attributes that can be the number of experts: with them the block runs with fewer.

    Raises:
        RefusedError: it does not, whichever are.
    """
    found = placed.mixture.counts
    refused: RefusedError | None = None
    for size in range(len(found), max(len(found) - MOST_COUNTS, 0) - 1, -1):
        for counts in combinations(found, size):
            tried = Placed(seen_as(placed.mixture, counts, 0, False), placed._block, placed._name)
            try:
                for hidden in inputs:
                    with tried.mapped(kept_K):
                        expected = run(hidden)
                    with tried.keeping(kept_K):
                        _require_close(run(hidden), expected, "its block computes something else with fewer experts")
            except RefusedError as why:
                refused = refused or why
            except Exception as error:  # whatever a size that is not the configuration's leads to
                text = " ".join(str(error).split())[:120]
                refused = refused or RefusedError(
                    f"its block does not run with fewer experts ({type(error).__name__}: {text})"
                )
            else:
                return counts
    assert refused is not None, "a set was tried"
    raise refused


def _is_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    scale = float(expected.double().norm()) or 1.0
    shape_fits = found.shape == expected.shape
    return shape_fits and float((found.double() - expected.double()).norm()) <= TOLERANCE[dtype] * scale


def _require_close(
    found: torch.Tensor, expected: torch.Tensor, otherwise: str, dtype: torch.dtype | None = None
) -> None:
    if not _is_close(found, expected, dtype or expected.dtype):
        raise RefusedError(otherwise)
