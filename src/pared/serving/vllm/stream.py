"""The tensors of a compressed folder on their way into an engine's model.

A model's own code looks at names, and reorders or transposes some weights as it reads them. So what it gets are tensors
that it can treat as a dense model's: a sparse weight unpacked, the bias of two factors under the layer's own name, a
shared basis under the name of every module that has it.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from pared.modules.packing import unpack, unpack_nm
from pared.modules.sparse import NMGroups
from pared.serving.vllm.layout import DOWN, FACTORS, Entry, UnsupportedError

PACKED = ("values", "bits")
SHOWN = 5  # names in a message


def expected(modules: Mapping[str, Entry], shared: Mapping[str, str]) -> set[str]:
    """Return the names of the tensors that a folder with this map holds for its modules."""
    names = {f"{name}.{part}" for name, entry in modules.items() for part in _parts(entry)}
    return names - shared.keys()


def _parts(entry: Entry) -> list[str]:
    kind = entry["kind"]
    if kind not in FACTORS:
        return [*(PACKED if kind == "sparse" else ["weight"]), *(["bias"] if entry["bias"] else [])]
    parts = ["up.weight", *(["up.bias"] if entry["bias"] else []), *(["order"] if kind == "pivoted" else [])]
    return parts if kind == "pivoted" and entry["rank"] == entry["in_features"] else [*parts, DOWN[1:]]


def for_engine(
    tensors: Iterable[tuple[str, torch.Tensor]], modules: Mapping[str, Entry], shared: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a folder as an engine reads them; one of another layer passes as it is.

    Args:
        tensors: by name, in any order.
        modules: the entries of the map.
        shared: the shared tensors of the map.

    Raises:
        UnsupportedError: values and bits of a sparse weight do not fit each other, or, once all are read, the tensor of
            a module in the map was not among them: the folder is damaged.
    """
    waiting = expected(modules, shared)
    packed: dict[str, dict[str, torch.Tensor]] = {}
    aliases: dict[str, list[str]] = {}
    for alias, owner in shared.items():
        aliases.setdefault(owner, []).append(alias)
    for name, tensor in tensors:
        if not tensor.numel():  # what stops a load without pared
            continue
        waiting.discard(name)
        module, _, part = name.rpartition(".")
        if part in PACKED and modules.get(module, {}).get("kind") == "sparse":
            parts = packed.setdefault(module, {})
            parts[part] = tensor
            if len(parts) == len(PACKED):
                yield f"{module}.weight", _unpacked(module, modules[module], **packed.pop(module))
        elif part == "bias" and (factors := module.removesuffix(".up")) != module and _is_factors(modules, factors):
            yield f"{factors}.bias", tensor
        else:
            yield name, tensor
            for alias in aliases.get(name, ()):
                yield alias, tensor.detach()  # a tensor of its own, as engines set attributes on it
    if waiting:
        shown = ", ".join(sorted(waiting)[:SHOWN])
        raise UnsupportedError(f"{len(waiting)} tensors that the map names are not in the folder's files: {shown}; "
                               "it is damaged, or the files of another model lie in it")  # fmt: skip


def _is_factors(modules: Mapping[str, Entry], name: str) -> bool:
    return modules.get(name, {}).get("kind") in FACTORS


def _unpacked(name: str, entry: Entry, values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    shape = (entry["out_features"], entry["in_features"])
    try:
        if not entry["group"]:
            return unpack(values, bits, shape)
        return unpack_nm(values.view(shape[0], -1), bits, shape, NMGroups(entry["kept"], entry["group"]))
    except (ValueError, RuntimeError) as error:
        raise UnsupportedError(f"{name}: {error}; the folder is damaged") from error
