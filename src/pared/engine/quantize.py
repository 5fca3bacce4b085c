"""Layers stored in few bits: dense ones, and both factors of low-rank ones, by their inputs where those are known.

The factors of a rank are balanced first: a scale for every rank moves from one to the other, so that the columns of
``up`` are of one size and none of them decides the scales of all. ``up`` is then fitted to what was rounded of
``down``, and rounded itself.

Legend of the shape suffixes: O outputs, N inputs, K the rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pared.allocation import Unit
from pared.calibration import BlockStatistics, StatisticView
from pared.engine.install import factors_of, put
from pared.engine.observe import Observer
from pared.engine.spec import LowRankSpec, PassSpec
from pared.engine.state.records import is_done
from pared.errors import ParedError
from pared.lowrank import Decomposition
from pared.modules import (
    LowRankLinear,
    NarrowConv1D,
    NarrowLinear,
    PivotedLinear,
    QuantizedLinear,
    SparseLinear,
    bits_of,
)
from pared.modules.replace import inherit_requires_grad
from pared.names import called
from pared.quantization.factors import balanced, fitted, turned
from pared.quantization.pricing import prices
from pared.quantization.rounding import Grid, Rounded, rounded
from pared.schema.bits import FORMS, LAYOUTS, Form, InFewBits
from pared.schema.plan import Plan, SitePlan
from pared.structure import bias_of, weight_of


def grid_of(form: str, dtype: torch.dtype) -> Grid:
    """Return of which numbers weights of a form are, with scales of a dtype."""
    bits, group = LAYOUTS[form]
    return Grid(bits, group, dtype)


@torch.no_grad()
def in_few_bits(old: nn.Module, form: str, gram_NN: torch.Tensor | None = None) -> QuantizedLinear | LowRankLinear:
    """Return a layer stored in a form; the layer itself is as it was.

    Args:
        old: dense, narrow, or of factors or pivots; of the last what comes has two factors.
        form: ``int8`` or ``int4``.
        gram_NN: the Gram of its inputs ``(in, in)``; none rounds to the nearest.

    Raises:
        ValueError: the layer cannot be stored so, or its numbers cannot; says why.
    """
    if isinstance(old, SparseLinear) or bits_of(old):
        what = "sparse: what is left of its weights" if isinstance(old, SparseLinear) else "stored in few bits and"
        raise ValueError(f"the layer is {what} cannot be rounded")
    if isinstance(old, (LowRankLinear, PivotedLinear)):
        new: QuantizedLinear | LowRankLinear = _factors_in_few_bits(old, form, gram_NN)
    else:
        if getattr(old, "parts", 1) != 1:
            raise ValueError("a layer whose outputs are several parts that lost channels cannot be stored in few bits")
        W_ON = weight_of(old).detach()
        grid, narrow = grid_of(form, W_ON.dtype), isinstance(old, (NarrowLinear, NarrowConv1D))
        found = rounded(W_ON, grid, gram_NN)
        new = _layer(found, bias_of(old), grid, narrow)
    inherit_requires_grad(new, old)
    return new


def _factors_in_few_bits(old: LowRankLinear | PivotedLinear, form: str, gram_NN: torch.Tensor | None) -> LowRankLinear:
    if old.shares is not None:
        raise ValueError(f"its basis {old.shares} is that of other layers too, and cannot be stored in few bits")
    factors = factors_of([old])
    factors = balanced(turned(factors) if isinstance(old, PivotedLinear) else factors)
    weight = old.up.weight
    grid = grid_of(form, weight.dtype)
    down = rounded(factors.down, grid, gram_NN)
    up_OK, latent_KK = factors.up, None
    if gram_NN is not None:
        up_OK, latent_KK = fitted(factors, down.weight().double(), gram_NN.double())
    up = rounded(up_OK, grid, latent_KK)
    rank, inputs = factors.down.shape
    bias = old.up.bias
    kind: Any = {"device": weight.device, "dtype": weight.dtype}
    new = LowRankLinear(
        inputs, len(up_OK), rank, bias is not None, narrow=old.narrow, bits=grid.bits, group=grid.group, **kind
    )
    new.down, new.up = _layer(down, None, grid), _layer(up, bias, grid)
    return new


def _layer(found: Rounded, bias_O: torch.Tensor | None, grid: Grid, narrow: bool = False) -> QuantizedLinear:
    return QuantizedLinear.of(found.integers_ON, found.scales_OG, bias_O, grid.bits, grid.group, narrow)


def quantize(observer: Observer, step: PassSpec, number: int, plan: Plan) -> None:
    """Store the sites of a compressed model as its plan says, each behind the blocks that are stored so already.

    Args:
        observer: that has read the tokens, if the pass runs on any.
        step: the pass.
        number: of it.
        plan: of the model.

    Raises:
        ParedError: a layer cannot be stored so; names it.
    """
    planned: dict[int, list[SitePlan]] = {}
    for site in plan.sites:
        if isinstance(site.decision, InFewBits) and site.decision.quantized:
            planned.setdefault(site.block, []).append(site)
    kept = observer.records.of_pass(step, number)

    def visit(block: BlockStatistics) -> None:
        with observer.watch("quantize"):
            sites = planned.get(block.index, [])
            made = observer.processes.each(sites, lambda site: _made(observer, site, block.statistics))
            for site, new in zip(sites, made, strict=True):
                there = next(observer.model.get_submodule(site.name).parameters()).device
                put(observer.model, [site.name], [new.to(there)])

    if step.runs == "nothing":
        observer.without_data(visit, changes=True, kept=kept)
    elif not is_done(kept):
        observer.forward(observer.capture(), _gram, visit, step, name="quantize", kept=kept)


def _gram(_: object) -> frozenset[str]:
    return frozenset({"gram"})


def _made(
    observer: Observer, site: SitePlan, statistics: Mapping[str, Mapping[str, StatisticView]]
) -> QuantizedLinear | LowRankLinear:
    old = observer.model.get_submodule(site.name)
    gram = statistics.get(site.name, {}).get("gram")
    form = getattr(site.decision, "quantized", None)
    assert form is not None
    try:
        return in_few_bits(old, form, gram.value if gram is not None and gram.tokens else None)
    except (ValueError, RuntimeError) as error:
        raise ParedError(
            f"site {site.name} as {form}: {error}; leave it out ({called('skip')}), or store it as it is"
        ) from error


def prices_of(
    spec: LowRankSpec, unit: Unit, W_ON: torch.Tensor, found: Decomposition, own: Mapping[str, torch.Tensor]
) -> dict[Form, torch.Tensor]:
    """Return what rounding a site costs, by form; nothing where nothing is known of its loss.

    Args:
        spec: whose method it was decomposed by.
        unit: the site.
        W_ON: its weight.
        found: its decomposition.
        own: its statistics as the method reads them.

    Raises:
        ParedError: it cannot be rounded; names the site.
    """
    most = spec.budget.most_rank(unit)
    if most < 1 or not bool(found.singular_values_R.any()):
        return {}
    gram_NN = own.get(spec.method.input_gram)
    gradient = next((own[name] for name in spec.gradients if name in own), None)
    factors = found.factors(most)
    try:
        return {form: prices(W_ON, factors, grid_of(form, W_ON.dtype), gram_NN, gradient) for form in FORMS}
    except (ValueError, RuntimeError) as error:
        raise ParedError(f"site {unit.name} in few bits: {error}") from error
