"""All methods by name: what pared brings, of every family, and what installed packages add.

A method is a declaration (:class:`Method`): its options as a type, the statistics it requires, and ``solve``, which
makes of weights and statistics a solution that answers every budget. An instance of
:class:`pared.lowrank.LowRankMethod` or :class:`pared.sparsity.PruningMethod` is one; a package adds it by an entry
point of the group ``pared.methods`` (docs/methods.md). The type of a method's options selects it: no two have the same.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from pared.errors import ParedError
from pared.lowrank.registry import METHODS as LOW_RANK
from pared.plugins import Registry
from pared.schema.options import Options
from pared.sparsity.registry import METHODS as PRUNING

if TYPE_CHECKING:
    import torch

    from pared.lowrank.decomposition import Decomposition
    from pared.sparsity.solution import PruningSolution

Family = Literal["low_rank", "sparse"]  # what a budget is of: ranks, or zeros
FAMILIES: tuple[Family, ...] = get_args(Family)
GROUP = "pared.methods"


class Method(Protocol):
    """What a method declares, whatever its family."""

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        ...

    @property
    def family(self) -> Family:
        """What its solutions answer budgets of."""
        ...

    @property
    def paper(self) -> str:
        """Where it comes from."""
        ...

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        ...

    @property
    def config(self) -> type[Options]:
        """The type of its options."""
        ...

    @property
    def allocation(self) -> str:
        """How a budget is spread unless a recipe says otherwise."""
        ...

    @property
    def requires(self) -> Callable[[Sequence[tuple[int, int]], Any], frozenset[str]]:
        """From the shapes ``(out, in)`` of the sites that read one tensor and the options to names of statistics."""
        ...

    @property
    def gradients(self) -> Callable[[Any], frozenset[str]]:
        """From the options to names of statistics of a backward pass."""
        ...

    @property
    def solve(self) -> "Callable[[Sequence[torch.Tensor], Sequence[Any], Any], Decomposition | PruningSolution]":
        """From weights ``(out, in)``, the statistics of each and the options to what answers every budget."""
        ...


def _read(name: str, found: Any) -> Method:
    """Return an object of another package as the method of a name.

    Raises:
        ValueError: it is none; says why.
    """
    lacks = [one for one in DECLARED if not hasattr(found, one)]
    if isinstance(found, type) or lacks:
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(f"expected a LowRankMethod or a PruningMethod, found {what}"
                         + (f" without {', '.join(lacks)}" if lacks else ""))  # fmt: skip
    method: Method = found
    if method.name != name:
        raise ValueError(f"it calls itself {method.name!r}; the two names must be one")
    if method.family not in FAMILIES:
        raise ValueError(f"unknown family {method.family!r}; expected one of {', '.join(FAMILIES)}")
    if not (isinstance(method.config, type) and issubclass(method.config, Options)):
        raise ValueError(f"expected a subclass of pared.schema.options.Options as config, found {method.config!r}")
    if taken := [one.name for one in BROUGHT.values() if one.config is method.config]:
        raise ValueError(f"its options are those of method {taken[0]}; give it a type of its own, a subclass of them")
    return method


DECLARED = ("name", "family", "paper", "summary", "config", "allocation", "requires", "gradients", "solve")
BROUGHT: dict[str, Method] = {**LOW_RANK, **PRUNING}
METHODS: Registry[Method] = Registry("method", GROUP, BROUGHT, _read)


def method_of(options: Options) -> Method:
    """Return the method that a set of options belongs to, by its type.

    Raises:
        ParedError: none does.
    """
    for method in METHODS.available().values():
        if type(options) is method.config:
            return method
    raise ParedError(f"{type(options).__name__} holds the options of no method; expected those of one of "
                     f"{', '.join(METHODS)}")  # fmt: skip
