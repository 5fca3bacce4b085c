"""Where the weights are: blocks and sites found by structure, never by a list of architecture names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pared.errors import ParedError
from pared.modules.opened import FIRST, SECOND, Expert
from pared.names import did_you_mean, match
from pared.schema.plan import Uncovered
from pared.structure.linear import LINEAR_TYPES, bias_of, weight_of
from pared.structure.opening import layout_of
from pared.structure.proof import fault_of_class, require_plain_weight

if TYPE_CHECKING:
    from pared.structure.mixture import Mixture

# For the report only, decides nothing: what a layer is usually called, from what its module is called.
KINDS = {
    "q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v",
    "o_proj": "o", "out_proj": "o", "dense": "dense", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_up_proj": "gate_up", "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv", "c_fc": "fc1",
    "fc1": "fc1", "fc2": "fc2", "dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2",
}  # fmt: skip
OF_EXPERTS = {FIRST: "expert in", SECOND: "expert out"}


@dataclass(frozen=True)
class Site:
    """One weight a method can be applied to.

    Attributes:
        name: full module name, ``model.layers.0.self_attn.q_proj``.
        block: index of the block it lies in.
        kind: what such a layer is usually called (q, k, v, o, gate, up, down ...); for the report only.
        out_features: rows of the weight seen as ``(out, in)``.
        in_features: its columns.
        has_bias: whether there is a bias.
        reads: sites with equal ``reads`` see the same input tensor; known after the probe pass.
        idle: nothing is said about it, as no token reached it or it could not be proved linear; it stays dense.
        seen: whether the probe pass ran it. Its few tokens do not reach every expert; a text may.
        owner: the class of the module it lies in, an attention or an expert.
        position: which of that module's sites it is: in the order they run, before the probe pass that of the model.
        transposed: its weight is stored ``(in, out)``, as GPT-2's.
    """

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int
    has_bias: bool
    reads: str
    idle: bool = False
    owner: str = ""
    position: int = 0
    transposed: bool = False
    seen: bool = True

    @property
    def parent(self) -> str:
        """Name of the module it lies in."""
        return self.name.rpartition(".")[0]

    @property
    def role(self) -> tuple[str, int]:
        """What is the same for the layers of one kind in every block, whatever they are called."""
        return self.owner, self.position


@dataclass(frozen=True)
class Anatomy:
    """The blocks and sites of a model, and what inside the blocks is not a site.

    Attributes:
        blocks_path: name of the list of blocks, ``model.layers``.
        sites: in the model's order.
        uncovered: weights (2-D and more) inside the blocks that are no site, and why.
        other_stacks: names of further block lists that were left alone (a vision tower, an encoder).
        model_parameters: of the whole model, tied ones counted once.
        layers: all linear layers of the blocks, in the model's order: the sites, and those left alone or refused. What
            a layer is to its module and to the other blocks goes by all of them.
        mixtures: of experts that can be taken out, where that was looked for.
    """

    blocks_path: str
    sites: tuple[Site, ...]
    uncovered: tuple[Uncovered, ...]
    other_stacks: tuple[str, ...]
    model_parameters: int
    layers: tuple[Site, ...] = ()
    mixtures: "tuple[Mixture, ...]" = ()

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", self.sites)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks themselves, in order."""
        stack = model.get_submodule(self.blocks_path)
        assert isinstance(stack, nn.ModuleList)
        return _registered(stack)

    def block_name(self, block: int) -> str:
        """Return the full name of a block."""
        return f"{self.blocks_path}.{block}"

    def sites_of(self, block: int) -> list[Site]:
        """Return the sites of one block."""
        return [site for site in self.sites if site.block == block]

    def mixtures_of(self, block: int) -> "list[Mixture]":
        """Return the mixtures of experts of one block."""
        return [mixture for mixture in self.mixtures if mixture.block == block]

    def path_in_block(self, site: Site) -> str:
        """Return a site's name relative to its block."""
        return site.name.removeprefix(self.block_name(site.block)).removeprefix(".")

    def with_idle(self, names: Iterable[str]) -> "Anatomy":
        """Return this anatomy with these sites idle too."""
        idle = set(names)
        return replace(self, sites=tuple(replace(s, idle=True) if s.name in idle else s for s in self.sites))

    def without(self, patterns: Iterable[str]) -> "Anatomy":
        """Return this anatomy with the matching sites left alone and listed as not covered.

        Raises:
            ParedError: a pattern matches nothing, or nothing is left.
        """
        skipped = match(patterns, [site.name for site in self.sites])
        left = self.leaving(dict.fromkeys(skipped, "skipped by the recipe"))
        if not left.sites:
            raise ParedError("skip: the patterns leave no site to compress; remove some")
        return left

    def leaving(self, reasons: Mapping[str, str]) -> "Anatomy":
        """Return this anatomy without some sites, which are listed as not covered, each with its reason."""
        left = tuple(
            Uncovered(
                name=site.name,
                shape=(site.out_features, site.in_features),
                parameters=site.out_features * site.in_features,
                reason=reasons[site.name],
            )
            for site in self.sites
            if site.name in reasons
        )
        kept = tuple(site for site in self.sites if site.name not in reasons)
        return replace(self, sites=kept, uncovered=(*self.uncovered, *left))

    def with_assumed_reads(self) -> "Anatomy":
        """Return this anatomy with ``reads`` guessed from shapes and order, where no pass can tell.

        Of the sites in one module the first, and the others as wide as it, are taken to read one tensor; not so the
        last, which outputs what the module does.
        """
        first: dict[str, Site] = {}
        last = {layer.parent: layer.name for layer in self.layers}
        reads: dict[str, str] = {}
        for layer in self.layers:
            leader = first.setdefault(layer.parent, layer)
            together = layer.in_features == leader.in_features and last[layer.parent] != layer.name
            reads[layer.name] = leader.name if together else layer.name
        return self.with_layers(tuple(replace(layer, reads=reads[layer.name]) for layer in self.layers))

    def with_layers(self, layers: Iterable[Site]) -> "Anatomy":
        """Return this anatomy with these layers for those it has; what names a layer that is no site names one now."""
        layers, kept = tuple(layers), {site.name for site in self.sites}
        leaders = {name: name for name in kept}
        sites = [layer for layer in layers if layer.name in kept]
        sites = [replace(site, reads=leaders.setdefault(site.reads, site.name)) for site in sites]
        return replace(self, sites=tuple(sites), layers=layers)


def find_anatomy(model: nn.Module, blocks_path: str | None = None) -> Anatomy:
    """Find the blocks of a model and the linear layers in them.

    The blocks are the module list with the most parameters that lies in no other; of a model with a language model
    inside, the largest in that. The model may be on the meta device.

    Args:
        model: of any architecture.
        blocks_path: name of another list, for a tower that is left alone otherwise.

    Raises:
        ParedError: there is no such list, or no linear layer in it (says what was found instead); a linear layer holds
            anything but plain floating point numbers, or shares its weight.
    """
    path, stacks = _find_stack(model, blocks_path)
    blocks = stacks[path]
    faults: dict[str, str] = {}
    layers = tuple(_layers(path, blocks, faults))
    sites = tuple(layer for layer in layers if layer.name not in faults)
    _require_own_weights(model, path, sites)
    uncovered = tuple(_uncovered(path, blocks, {site.name for site in sites}, faults))
    if not sites:
        weights = [f"{weight.name} {weight.shape} ({weight.reason})" for weight in uncovered]
        found = ", ".join([*_integers(path, blocks)[:3], *weights][:3])
        raise ParedError(
            f"{type(model).__name__}: no linear layer inside the {len(_registered(blocks))} blocks of {path}; "
            f"the weights there are {found or 'none'}; this architecture is not supported"
        )
    return Anatomy(
        blocks_path=path,
        sites=sites,
        uncovered=uncovered,
        other_stacks=tuple(name for name in stacks if name != path),
        model_parameters=_count(model),
        layers=layers,
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, whatever is in them.

    Raises:
        ParedError: there is no list of blocks.
    """
    path, stacks = _find_stack(model, None)
    return _registered(stacks[path])


def find_blocks_path(model: nn.Module, blocks_path: str | None = None) -> str:
    """Return the name of the list of blocks, as :func:`find_anatomy` finds it; nothing is asked of what is in them.

    Raises:
        ParedError: there is no such list.
    """
    return _find_stack(model, blocks_path)[0]


def _registered(stack: nn.ModuleList) -> list[nn.Module]:
    """Return what a list holds, each once for every place; a looped stack may iterate over it in another order."""
    return [module for module in stack._modules.values() if module is not None]


def _find_stack(model: nn.Module, asked: str | None) -> tuple[str, dict[str, nn.ModuleList]]:
    """Return the name of the list of blocks, and all lists there are."""
    stacks = dict(sorted(_stacks(model), key=lambda item: _count(item[1]), reverse=True))
    if not stacks:
        found = f"{type(model).__name__}: no list of blocks found; nothing could be compressed"
        for name, module in model.named_modules():
            if ".quantized" in type(module).__module__:
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ParedError(f"{found}; {name} is a {kind}: load the model without quantisation")
        raise ParedError(found)
    inside = _language_model(model)
    path = asked or next((path for path in stacks if inside and path.startswith(f"{inside}.")), next(iter(stacks)))
    if path not in stacks:
        raise ParedError(f"{type(model).__name__} has no list of blocks {path!r}; {did_you_mean(path, stacks)}")
    return path, stacks


def _language_model(model: nn.Module) -> str:
    """Return the name of what the model itself says is its decoder, beside a vision tower or an encoder; "" if none."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _require_own_weights(model: nn.Module, path: str, sites: tuple[Site, ...]) -> None:
    """Refuse sites whose weight is also another's: a change of one would be, or would not be, a change of both."""
    owner = {id(model.get_submodule(site.name).weight): site.name for site in reversed(sites)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        site = owner.get(id(parameter))
        if site is None or name == f"{site}.weight":
            continue
        one, two = (place.removeprefix(f"{path}.").partition(".")[0] for place in (site, name))
        blocks = model.get_submodule(path)._modules
        if name.startswith(f"{path}.") and one != two and blocks[one] is blocks[two]:
            raise ParedError(
                f"blocks {path}.{one} and {path}.{two} are one module; a block that is listed twice is not supported"
            )
        raise ParedError(
            f"sites {site} and {name.removesuffix('.weight')} are tied to one weight; tied layers are not supported, "
            "give each a weight of its own"
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost module lists that hold weights."""
    outer: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in outer)
        if isinstance(module, nn.ModuleList) and not inside and any(p.ndim >= 2 for p in module.parameters()):
            outer.append(name)
            yield name, module


def _layers(path: str, blocks: nn.ModuleList, faults: dict[str, str]) -> Iterator[Site]:
    """Yield the linear layers; write down, by name, why some are no sites."""
    known: dict[Any, str | None] = {}
    for block, root in enumerate(_registered(blocks)):
        positions: dict[str, int] = {}
        modules = dict(root.named_modules())
        for name, module in modules.items():
            if not isinstance(module, LINEAR_TYPES):
                continue
            full, (parent, _, leaf) = f"{path}.{block}.{name}".rstrip("."), name.rpartition(".")
            require_plain_weight(module, full)
            if fault := fault_of_class(module, known):
                faults[full] = fault
            out_features, *_, in_features = weight_of(module).shape
            owner = type(modules[parent] if name else blocks)
            yield Site(
                name=full,
                block=block,
                kind=OF_EXPERTS[leaf] if isinstance(modules[parent], Expert) else KINDS.get(leaf, leaf),
                out_features=out_features,
                in_features=in_features,
                has_bias=bias_of(module) is not None,
                reads=full,
                owner=f"{owner.__module__}.{owner.__qualname__}",
                position=positions.setdefault(parent, 0),
                transposed=isinstance(module, Conv1D),
            )
            positions[parent] += 1


def _uncovered(path: str, blocks: nn.ModuleList, sites: set[str], faults: Mapping[str, str]) -> Iterator[Uncovered]:
    for name, parameter in blocks.named_parameters(prefix=path):
        owner = name.rpartition(".")[0]
        if parameter.ndim >= 2 and owner not in sites:
            what = "not the weight of a linear layer"
            if parameter.ndim == 3:
                why = layout_of(blocks.get_submodule(owner.removeprefix(f"{path}.")))
                what = "a 3-D stack of expert weights" + (f": {why}" if why and isinstance(why, str) else "")
            fault = next((why for layer, why in faults.items() if name.startswith(f"{layer}.")), what)
            yield Uncovered(name=name, shape=tuple(parameter.shape), parameters=parameter.numel(), reason=fault)


def _integers(path: str, blocks: nn.ModuleList) -> list[str]:
    """Return what quantised layers of other libraries hold, for the error."""
    tensors = blocks.named_buffers(prefix=path)
    return [f"{n} {tuple(t.shape)} of {t.dtype}" for n, t in tensors if t.ndim >= 2 and not t.is_floating_point()]
