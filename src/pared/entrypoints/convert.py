"""A folder stored in another way: its weights as two factors, as pivots and coefficients, or in few bits."""

from pathlib import Path
from typing import NamedTuple, cast

from torch import nn

from pared.arguments import folder_from, name_from
from pared.checkpoint.load import load, require_recorded
from pared.checkpoint.portable import module_map
from pared.checkpoint.save import mark
from pared.checkpoint.verify import require_tensors
from pared.engine.install import factors_of, install_group, put
from pared.engine.quantize import in_few_bits
from pared.entrypoints.publish import Publication, Reread, ResidentSaver
from pared.errors import ParedError
from pared.io.output_dir import require_free
from pared.models.source import find_model
from pared.models.trust import trusting
from pared.modules import LowRankLinear, PivotedLinear, SparseLinear, bits_of
from pared.names import is_told_in_flags, require_known
from pared.schema.bits import FORMS, InFewBits
from pared.schema.manifest import Manifest
from pared.schema.plan import Dense, Plan


def convert(
    folder: str | Path,
    out: str | Path,
    pivoted: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Manifest:
    """Write a compressed folder with every low-rank weight stored pivoted, or as two factors, or all in few bits.

    As factors or pivots weights stay what they were up to rounding: the new folder is loaded and must give the answers
    that were recorded when the model was compressed. Recipe, perplexities and seconds in its manifest are those of that
    time. In few bits they are other weights: the manifest has no perplexity of them.

    Args:
        folder: that pared made.
        out: the folder to make.
        pivoted: pivots and coefficients, in rank² fewer numbers, if true; two factors if false.
        overwrite: whether a folder there that pared wrote may be replaced.
        trust_remote_code: whether code that lies in the folder may run.
        quantize: ``int8`` or ``int4``, to which every target weight is rounded, each to the nearest; pivots become two
            factors. ``pared.compress`` with the same name rounds better, by what layers read.

    Returns:
        The manifest of the new folder.

    Raises:
        ParedError: not a folder that pared made, damaged, nothing in it to convert, the output is taken, or the new
            folder does not answer as the old one; nothing was written.

    Example:
        >>> pared.convert("smaller", "pivoted").bytes_on_disk  # doctest: +SKIP
    """
    function = "pared.convert"
    if not isinstance(pivoted, bool):
        raise ParedError(f"{function}: expected pivoted True or False, got {pivoted!r}")
    if quantize is not None:
        require_known("form of few bits", quantize, FORMS)
    folder, out = Path(name_from(folder, function)), folder_from(out, function)
    with trusting(trust_remote_code):
        return _convert(folder, out, pivoted, overwrite, quantize)


def _convert(folder: Path, out: Path, pivoted: bool, overwrite: bool, form: str | None) -> Manifest:
    require_free(out, overwrite, [folder])
    manifest = Manifest.read(folder)
    require_tensors(folder)
    require_recorded(folder)  # else what is damaged would be listed as whole
    model = load(folder)
    stored = (
        _rounded(folder, model, manifest.plan, form) if form else _as_factors(folder, model, manifest.plan, pivoted)
    )
    mark(model)
    source = find_model(str(folder))
    # Rounded weights answer otherwise than those whose answers were recorded.
    fingerprint = None if form else manifest.fingerprint
    saver = ResidentSaver(model, source.tokenizer(), source, fingerprint)
    del model
    lost = {"perplexity_after": None} if form else {}

    def converted(reread: Reread) -> Manifest:
        return manifest.model_copy(update={**reread.recorded, **lost, "plan": stored.plan, "converted": stored.name,
                                           "elastic": None})  # fmt: skip

    publication = Publication(out, str(folder), overwrite, stored.plan.after.bytes_on_disk, beside=[folder])
    return publication.publish(saver, converted)


class _Stored(NamedTuple):
    """What became of the layers of a model.

    Attributes:
        plan: as they are stored now.
        name: of that way.
    """

    plan: Plan
    name: str


def _rounded(folder: Path, model: nn.Module, plan: Plan, form: str) -> _Stored:
    """Store every site of a plan in few bits, in place.

    Raises:
        ParedError: a layer cannot be stored so; names it.
    """
    sites = []
    for site in plan.sites:
        if not isinstance(site.decision, InFewBits):
            raise ParedError(f"{folder}: {site.name} has {site.decision} and cannot be {form}: only dense weights, "
                             "factors and narrow layers are stored in few bits")  # fmt: skip
        try:
            put(model, [site.name], [in_few_bits(model.get_submodule(site.name), form)])
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"{folder}: {site.name} as {form}: {error}") from error
        as_factors = {"pivoted": False} if getattr(site.decision, "pivoted", False) else {}
        decision = site.decision.model_copy(update={"quantized": form, **as_factors})
        sites.append(site.model_copy(update={"decision": decision}))
    return _Stored(plan.model_copy(update={"sites": tuple(sites)}), form)


def _as_factors(folder: Path, model: nn.Module, plan: Plan, pivoted: bool) -> _Stored:
    """Store every low-rank weight pivoted, or as two factors, in place.

    Raises:
        ParedError: there is none that is not, or one cannot be.
    """
    groups = _groups(model, LowRankLinear if pivoted else PivotedLinear)
    if not groups:
        raise ParedError(f"{folder} has nothing to convert: {_nothing(model, pivoted)}")
    for names in groups:
        try:
            old = [cast("LowRankLinear | PivotedLinear", model.get_submodule(name)) for name in names]
            install_group(model, names, factors_of(old), pivoted)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"{folder}: {names[0]}: {error}") from error
    form = "pivots and coefficients" if pivoted else "two factors"
    return _Stored(_replanned(plan, {name for names in groups for name in names}, pivoted), form)


def _nothing(model: nn.Module, pivoted: bool) -> str:
    """Say why no module can be stored the other way, and what can be done."""
    changed = {name: model.get_submodule(name) for name in module_map(model)}
    if not changed:
        return "its weights are plain already"
    if any(map(bits_of, changed.values())):
        return "its layers are stored in few bits"
    if not any(isinstance(layer, (LowRankLinear, PivotedLinear)) for layer in changed.values()):
        sparse = any(isinstance(layer, SparseLinear) for layer in changed.values())
        return (
            f"its {len(changed)} changed layers are {'sparse' if sparse else 'narrow'}, the first is "
            f"{next(iter(changed))}, and have no factors or pivots; for plain weights of the dense model's sizes: "
            f"{'--dense' if is_told_in_flags() else 'pared.export'}"
        )
    form, other = ("pivoted", "two factors") if pivoted else ("two factors", "pivoted")
    return f"no module is stored as {other}, all there is is {form}"


def _groups(model: nn.Module, kind: type[nn.Module]) -> list[list[str]]:
    """Return the names of the modules of a kind, those with one basis together."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if type(module) is kind and not bits_of(module):
            assert isinstance(module, (LowRankLinear, PivotedLinear))
            groups.setdefault(id(module if module.down is None else module.down.weight), []).append(name)
    return list(groups.values())


def _replanned(plan: Plan, names: set[str], pivoted: bool) -> Plan:
    """Return the plan with the storage of these sites changed.

    Raises:
        ParedError: a module is not a low-rank site of the plan.
    """
    sites = []
    for site in plan.sites:
        if site.name in names and not isinstance(site.decision, Dense):
            names = names - {site.name}
            decision = site.decision.model_copy(update={"pivoted": pivoted})
            sites.append(site.model_copy(update={"decision": decision}))
        else:
            sites.append(site)
    if names:
        raise ParedError(f"{sorted(names)[0]} is stored with a low rank but the plan in pared.json says otherwise")
    return plan.model_copy(update={"sites": tuple(sites)})
