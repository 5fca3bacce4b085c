"""Models of uniform widths and numbers of heads as plain ones: what their configurations have to say."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pared.checkpoint.portable import module_map, own_class
from pared.models.resized import Sizes, resized
from pared.modules import replace_module
from pared.modules.narrow import forget_counts

NARROW = ("narrow", "narrow_conv1d")
HEAD_DIM = (
    "head_dim"  # what a configuration calls the width of a head where it is not that of the model by their number
)

Pairs = set[tuple[int, int]]  # widths before and now


def plain_sizes(model: PreTrainedModel) -> Sizes:
    """Return the fields of a configuration that make the architecture have exactly the shapes of a narrow model.

    Fields are tried, not known by their names: one that holds the dense width, or nothing (GPT-2's ``n_inner``), gets
    the width that is left; those whose values may be numbers of heads get the numbers that are left, and the width of a
    head is said. The architecture is built without weights each time.

    Args:
        model: some of whose layers lost channels or heads; its blocks may be on the meta device.

    Returns:
        Values by field of the text configuration; empty where anything else was changed, where widths differ, or where
        no fields do it.
    """
    entries = module_map(model)
    if not entries or any(entry["kind"] not in NARROW for entry in entries.values()):
        return {}
    # Code of the model's own comes along with the loader alone.
    if not own_class(type(model)).__module__.startswith("transformers."):
        return {}
    dense = built = _skeleton(model, {})
    if dense is None or not entries.keys() <= dict(dense.named_modules()).keys():  # modules were put in by hand
        return {}
    pairs = {pair for name, entry in entries.items() for pair in _changed(dense, name, entry)}
    sizes, left = Sizes(), _unlike(model, dense)
    while left:
        for tried in _candidates(model.config.get_text_config().to_dict(), pairs):
            new = _skeleton(model, {**sizes, **tried})
            if new is not None and (rest := _unlike(model, new)) < left:
                built, sizes, left = new, {**sizes, **tried}, rest
                break
        else:
            return {}
    assert built is not None
    fields = model.config.get_text_config().to_dict()
    pairs |= {(fields[field], now) for field, now in sizes.items() if fields.get(field)}
    return sizes if _count_alike(model, built, entries, pairs) else {}


def _candidates(fields: Mapping[str, Any], pairs: Pairs) -> Iterator[Sizes]:
    """Yield values of fields that may give some layers their widths, the likeliest first."""
    numbers = {field: value for field, value in fields.items() if type(value) is int and value > 0}
    yield from ({field: now} for field, value in numbers.items() for before, now in pairs if value == before)
    yield from _heads({field: value for field, value in numbers.items() if field != HEAD_DIM}, pairs)
    yield from ({field: now} for field, value in fields.items() for _, now in pairs if value is None)


def _heads(numbers: Sizes, pairs: Pairs) -> Iterator[Sizes]:
    """Yield numbers of query and of key/value heads that are left, with the width of a head, which is as before."""
    counts = [
        (field, value * now // before, before // value, (now, before))
        for field, value in numbers.items()
        for before, now in pairs
        if before % value == 0 and value * now % before == 0
    ]
    for (one, queries, width, (now, before)), (other, keys, as_wide, (less, than)) in product(counts, counts):
        if one != other and width == as_wide and now * than == less * before and queries >= keys:
            yield {one: queries, other: keys, HEAD_DIM: width}
    yield from ({field: now, HEAD_DIM: width} for field, now, width, _ in counts)


def _unlike(model: nn.Module, built: nn.Module) -> set[str]:
    """Return the names of parameters and buffers that two models do not both have in one shape."""
    one, other = ({(n, tuple(t.shape)) for n, t in (*m.named_parameters(), *m.named_buffers())} for m in (model, built))
    return {name for name, _ in one ^ other}


def _count_alike(model: nn.Module, built: nn.Module, entries: Mapping[str, Any], pairs: Pairs) -> bool:
    """Whether the modules that lost something differ in no number but those of what they lost.

    Shapes alone do not say it: as many heads of half the width have the same.
    """
    for name in {entry.rpartition(".")[0] for entry in entries}:
        own, new = vars(model.get_submodule(name)), vars(built.get_submodule(name))
        numbers = {key: value for key, value in new.items() if type(value) in (int, float)}
        if any(own.get(key) != value and (own.get(key), value) not in pairs for key, value in numbers.items()):
            return False
    return True


def _skeleton(model: PreTrainedModel, sizes: Sizes) -> nn.Module | None:
    """Return the architecture on the meta device with other sizes of the text model, None where that makes none."""
    return resized(model, sizes, own_class(type(model)))


def _changed(dense: nn.Module, name: str, entry: dict[str, Any]) -> Pairs:
    """Return the widths of a layer before and now, of the side that lost channels."""
    weight: Any = dense.get_submodule(name).weight
    out, width = weight.shape if entry["kind"] == "narrow" else weight.shape[::-1]
    sides = {(int(width), entry["in_features"]), (int(out) // entry["parts"], entry["out_features"] // entry["parts"])}
    return {(before, now) for before, now in sides if before != now}


def make_plain(model: PreTrainedModel) -> None:
    """Put a linear layer of the architecture's own class in the place of every narrow one; parameters stay theirs."""
    for name in module_map(model):
        old = model.get_submodule(name)
        base = nn.Linear if isinstance(old, nn.Linear) else Conv1D
        new: nn.Module = base.__new__(base)
        vars(new).update({key: value for key, value in vars(old).items() if key != "parts"})
        replace_module(model, name, new)
    forget_counts(model)
