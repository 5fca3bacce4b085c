"""The format's map: what may stand in ``quantization_config``, and nothing else gets past reading it.

This file is a part of the loader that a saved folder carries, so it may use torch, transformers and ``modules/`` only.
"""

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from pared.modules.low_rank import LowRankLinear
from pared.modules.narrow import NarrowConv1D, NarrowLinear
from pared.modules.opened import BETWEEN, CALLS, Layout
from pared.modules.packing import LARGEST_GROUP
from pared.modules.pivoted import PivotedLinear
from pared.modules.quantized import LEAST, QuantizedLinear
from pared.modules.shared import DOWN
from pared.modules.sparse import SparseLinear

QUANT_METHOD = "pared"
FORMAT_VERSION = 1
LOADER_NAME = "modeling_pared"

# Without this package transformers knows no `quant_method: pared`, warns, and fills what it does not find with random
# numbers. A weight that is not of its shape makes it refuse the folder instead, and print the name of this tensor.
NOTICE = "import_pared_or_trust_remote_code"

# Limits of a map. No model comes near them; a damaged or hostile folder must not make anything of such a size.
LARGEST_SIDE = 2**24
MOST_MODULES = 10**6
LONGEST_NAME = 1000

# kind in the map -> (module class, the keys its entry has besides `kind`)
MODULE_TYPES: dict[str, tuple[type[nn.Module], frozenset[str]]] = {
    "low_rank": (LowRankLinear, frozenset({"in_features", "out_features", "rank", "bias"})),
    "pivoted": (PivotedLinear, frozenset({"in_features", "out_features", "rank", "bias"})),
    "sparse": (SparseLinear, frozenset({"in_features", "out_features", "bias", "stored", "kept", "group"})),
    "quantized": (QuantizedLinear, frozenset({"in_features", "out_features", "bias", "bits", "group"})),
    "narrow": (NarrowLinear, frozenset({"in_features", "out_features", "bias", "parts"})),
    "narrow_conv1d": (NarrowConv1D, frozenset({"in_features", "out_features", "bias", "parts"})),
}

# kind in the map -> a key that its entry may have besides, whose value is true
MARKS: dict[str, frozenset[str]] = dict.fromkeys(("low_rank", "pivoted", "quantized"), frozenset({"narrow"}))
# Keys that an entry of factors has besides if they are stored in few bits.
FEW_BITS = frozenset({"bits", "group"})

# A kind that an installed package adds is PACKAGE:NAME in the map, NAME an entry point of this group.
MODULE_GROUP = "pared.modules"
ADDED_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}:[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

MOST_COUNTS = 8  # numbers by which one module counts its heads
ATTRIBUTE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")

Entry = dict[str, Any]
# key -> the least and the most it may be, given the rest of its entry; checked in this order
RANGES: dict[str, tuple[int, Callable[[Entry], int]]] = {
    "in_features": (1, lambda _: LARGEST_SIDE),
    "out_features": (1, lambda _: LARGEST_SIDE),
    "rank": (1, lambda entry: entry["in_features"]),  # a shared basis may have more than one member has outputs
    "stored": (0, lambda entry: entry["in_features"] * entry["out_features"]),
    "bits": (0, lambda _: max(LEAST)),
    "group": (0, lambda entry: LARGEST_GROUP if "bits" in entry else min(entry["in_features"], LARGEST_GROUP)),
    "kept": (0, lambda entry: entry["group"]),
    "parts": (1, lambda entry: entry["out_features"]),
}


class ParedConfig(QuantizationConfigMixin):
    """The map of a compressed checkpoint: ``quantization_config`` in ``config.json``.

    Args:
        format_version: of the folder's layout.
        modules: for every changed module, by full name, its kind, shape and exact rank.
        shared: for every tensor that is not stored, as it is that of another module, the name of the one that is.
        heads: for every module that counts heads by numbers of its own and lost some, these numbers by their names.
        experts: for every module whose experts are layers of their own here, how it holds them in the architecture.
        quant_method: always ``pared``.

    Raises:
        ValueError: written by a newer version, a key this version does not know, or a malformed map.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, Entry] | None = None,
        shared: dict[str, str] | None = None,
        heads: dict[str, dict[str, int]] | None = None,
        experts: dict[str, Entry] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"format_version: got {brief(format_version)}, expected a whole number from 1")
        if format_version > FORMAT_VERSION or unknown:
            raise ValueError(
                f"checkpoint of pared format version {brief(format_version)}"
                f"{f' with unknown keys {brief(sorted(unknown))}' if unknown else ''}; this loader reads version "
                f"{FORMAT_VERSION}: update pared"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = _checked({} if modules is None else modules)
        self.shared = _checked_shared({} if shared is None else shared, self.modules)
        self.heads = _checked_heads({} if heads is None else heads)
        self.experts = _checked_experts({} if experts is None else experts)

    @property
    def guard(self) -> str | None:
        """Name of the weight that stops whoever loads the folder without this package; None where nothing need.

        It is that of the first module by name whose tensors have other names than the dense layer's, or of experts that
        the architecture holds in one tensor, stored without numbers, beside another such tensor of the name
        :data:`NOTICE`.
        """
        inside = tuple(f"{name}." for name in self.experts)
        renamed = [
            name
            for name, entry in self.modules.items()
            if not entry["kind"].startswith("narrow") and not name.startswith(inside)
        ]
        if renamed:
            return f"{min(renamed)}.weight"
        name = min(self.experts, default=None)
        return None if name is None else f"{name}.{self.experts[name]['first']}"

    def layouts(self) -> dict[str, Layout]:
        """Return how the architecture holds the experts that are layers of their own, by the name of the module."""
        return {name: Layout(**entry) for name, entry in self.experts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are stored, without lists of what there is none of."""
        fields: dict[str, Any] = super().to_dict()
        return {key: value for key, value in fields.items() if value or key not in ("shared", "heads", "experts")}


def added_kinds() -> dict[str, EntryPoint]:
    """Return the kinds that installed packages add, none of them imported."""
    found = entry_points(group=MODULE_GROUP)
    return {f"{entry.dist.name}:{entry.name}": entry for entry in found if entry.dist is not None}


def module_type(kind: str) -> type[nn.Module]:
    """Return the class of a kind of module: of this format, or of an installed package.

    A class of a package is made from the keys of its entry, ``device`` and ``dtype``, and its ``entry()`` returns them.

    Raises:
        ValueError: the package is not installed, or what it adds cannot be used.
    """
    if kind in MODULE_TYPES:
        return MODULE_TYPES[kind][0]
    package = kind.partition(":")[0]
    entry = added_kinds().get(kind)
    if entry is None:
        raise ValueError(f"modules of kind {brief(kind)} are those of package {package!r}, which is not installed here "
                         "or adds none of that name; install it if you trust where this model is from")  # fmt: skip
    try:
        found: Any = entry.load()
    except Exception as error:  # whatever a package does when it is imported
        raise ValueError(f"kind {brief(kind)}: package {package!r} cannot be imported ({error!r})") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "entry")):
        raise ValueError(f"kind {brief(kind)}: {entry.value} is not a torch module with an entry()")
    return found


def brief(value: object) -> str:
    """Return a value as it is quoted in a message: of any size, never more than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; nesting without end
        return f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _called(name: object) -> str:
    return name[:LONGEST_NAME] if isinstance(name, str) else brief(name)


def _checked(modules: Any) -> dict[str, Entry]:
    """Return the map if every entry of it has a known kind, exactly that kind's keys, and values in range."""
    if not isinstance(modules, dict):
        raise ValueError(f"the map of modules is {type(modules).__name__}, expected an entry by module name")
    if len(modules) > MOST_MODULES:
        raise ValueError(f"the map has {len(modules)} modules, expected {MOST_MODULES} at most")
    for name, entry in modules.items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise ValueError(f"map entry {brief(name)}: expected a name of 1 to {LONGEST_NAME} characters")
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if isinstance(kind, str) and ADDED_KIND.fullmatch(kind):
            _check_added(name, kind, entry)
        else:
            _check_entry(name, kind, entry)
    return modules


def _check_entry(name: str, kind: object, entry: Any) -> None:
    known = isinstance(kind, str) and kind in MODULE_TYPES
    marks = {key for key in MARKS.get(str(kind), frozenset()) if known and entry.get(key) is True}
    if known and kind == "low_rank" and entry.keys() >= FEW_BITS:
        marks |= FEW_BITS
    if not known or entry.keys() - {"kind"} - marks != MODULE_TYPES[str(kind)][1]:
        raise ValueError(f"map entry {name}: unknown or malformed {brief(entry)}; known kinds: {sorted(MODULE_TYPES)}")
    if type(entry["bias"]) is not bool:
        raise ValueError(f"map entry {name}: bias is {brief(entry['bias'])}, expected true or false")
    for key in RANGES.keys() & entry.keys():
        if type(entry[key]) is not int:
            raise ValueError(f"map entry {name}: {key} is {brief(entry[key])}, expected a whole number")
    for key, (least, most) in RANGES.items():
        if key in entry and not least <= entry[key] <= most(entry):
            raise ValueError(f"map entry {name}: {key} is {brief(entry[key])}, expected {least} to {most(entry)}")
    _check_kind(name, entry)


def _check_kind(name: str, entry: Entry) -> None:
    """Check what only some kinds have: N:M, few bits, equal parts."""
    kind = entry["kind"]
    if kind == "sparse" and entry["group"]:
        inputs, group, kept = entry["in_features"], entry["group"], entry["kept"]
        if inputs % group or not kept or entry["stored"] != entry["out_features"] * inputs // group * kept:
            raise ValueError(f"map entry {name}: {kept}:{group} does not fit {brief(entry)}")
    elif kind == "sparse" and entry["kept"]:
        raise ValueError(f"map entry {name}: kept is {entry['kept']} without a group")
    if "bits" in entry and entry["bits"] not in LEAST:
        raise ValueError(f"map entry {name}: bits is {brief(entry['bits'])}, expected {' or '.join(map(str, LEAST))}")
    if "parts" in entry and entry["out_features"] % entry["parts"]:
        raise ValueError(f"map entry {name}: {entry['out_features']} outputs are not {entry['parts']} equal parts")
    if kind == "narrow_conv1d" and not entry["bias"]:
        raise ValueError(f"map entry {name}: bias is False; a layer of the kind of Conv1D has one")


def _check_added(name: str, kind: str, entry: Entry) -> None:
    """Check an entry of another package's kind: sides in range, and values that are plain; the rest is the class's."""
    for key in ("in_features", "out_features"):
        if type(entry.get(key)) is not int or not 0 < entry[key] <= LARGEST_SIDE:
            raise ValueError(f"map entry {name}: {key} is {brief(entry.get(key))}, expected 1 to {LARGEST_SIDE}")
    for key, value in entry.items():
        if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)) or len(brief(value)) > 200:
            raise ValueError(f"map entry {name}: {brief(key)} is {brief(value)}, expected a number or a short text")
    try:
        module_type(kind)
    except ValueError as error:
        raise ValueError(f"map entry {name}: {error}") from error


def _checked_shared(shared: Any, modules: dict[str, Entry]) -> dict[str, str]:
    """Return the shared tensors if every one of them and its owner are a ``down`` of the map, of one shape."""
    if not isinstance(shared, dict):
        raise ValueError(f"the shared tensors are {type(shared).__name__}, expected the owner's name by tensor name")
    shapes = {
        name + DOWN: {key: entry[key] for key in ("kind", "in_features", "rank")}
        for name, entry in modules.items()
        if "rank" in entry and "bits" not in entry  # what is stored in few bits is no tensor that others may have
    }
    for alias, owner in shared.items():
        for tensor in (alias, owner):
            if not isinstance(tensor, str) or tensor not in shapes:
                raise ValueError(
                    f"shared tensor {_called(alias)}: {_called(tensor)} is not the {DOWN[1:]} of a module in the map"
                )
        if owner in shared:
            raise ValueError(f"shared tensor {alias}: its owner {owner} is shared itself, expected one that is stored")
        if shapes[alias] != shapes[owner]:
            raise ValueError(
                f"shared tensor {alias}: {shapes[alias]} in the map, but its owner {owner} is {shapes[owner]}"
            )
    return shared


def _checked_heads(heads: Any) -> dict[str, dict[str, int]]:
    """Return the numbers of heads if each is a number in range of an attribute with a name."""
    if not isinstance(heads, dict) or len(heads) > MOST_MODULES:
        raise ValueError(f"the numbers of heads are {type(heads).__name__}, expected numbers by name by module name")
    for module, counts in heads.items():
        if not isinstance(module, str) or not 0 < len(module) <= LONGEST_NAME:
            raise ValueError(f"heads of {brief(module)}: expected a name of 1 to {LONGEST_NAME} characters")
        if not isinstance(counts, dict) or not 0 < len(counts) <= MOST_COUNTS:
            raise ValueError(f"heads of {module}: got {brief(counts)}, expected 1 to {MOST_COUNTS} numbers by name")
        for name, count in counts.items():
            if not isinstance(name, str) or not ATTRIBUTE.fullmatch(name):
                raise ValueError(f"heads of {module}: {brief(name)} is not the name of an attribute")
            if type(count) is not int or not 0 < count <= LARGEST_SIDE:
                raise ValueError(f"heads of {module}: {name} is {brief(count)}, expected 1 to {LARGEST_SIDE}")
    return heads


def _checked_experts(experts: Any) -> dict[str, Entry]:
    """Return the layouts of experts if each is one: names of attributes, a way between the layers and one to call."""
    if not isinstance(experts, dict) or len(experts) > MOST_MODULES:
        raise ValueError(f"the experts are {type(experts).__name__}, expected a layout by module name")
    for name, entry in experts.items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise ValueError(f"experts of {brief(name)}: expected a name of 1 to {LONGEST_NAME} characters")
        fields = Layout.__dataclass_fields__.keys()
        if not isinstance(entry, dict) or entry.keys() != fields:
            raise ValueError(f"experts of {name}: got {brief(entry)}, expected {', '.join(fields)}")
        for key in ("first", "second", "first_bias", "second_bias"):
            text = entry[key]
            if not isinstance(text, str) or not (ATTRIBUTE.fullmatch(text) or (text == "" and key.endswith("bias"))):
                raise ValueError(f"experts of {name}: {key} is {brief(text)}, expected the name of a parameter")
        named = Layout(**entry).names
        if len(set(named)) < len(named):
            raise ValueError(f"experts of {name}: one parameter is named twice in {brief(entry)}")
        if type(entry["transposed"]) is not bool or entry["between"] not in BETWEEN or entry["call"] not in CALLS:
            raise ValueError(f"experts of {name}: unknown or malformed {brief(entry)}")
    return experts
