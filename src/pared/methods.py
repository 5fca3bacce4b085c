"""All methods by name: those built in, of every family, and those that installed packages add.

A method is a declaration (:class:`Method`): its options as a type, the statistics it requires, and ``solve``, which
makes of weights and statistics a solution that answers every budget. An instance of
:class:`pared.lowrank.LowRankMethod` or :class:`pared.sparsity.PruningMethod` is one; a package adds it by an entry
point of the group ``pared.methods`` (docs/methods.md). The type of a method's options selects it: no two have the same.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pared.errors import ParedError
from pared.lowrank.registry import METHODS as LOW_RANK
from pared.lowrank.registry import LowRankMethod
from pared.operations import Operation
from pared.plugins import Registry
from pared.schema.options import Options
from pared.sparsity.registry import METHODS as PRUNING
from pared.sparsity.registry import PruningMethod
from pared.widths.registry import METHODS as WIDTHS

if TYPE_CHECKING:
    import torch

    from pared.lowrank.decomposition import Decomposition
    from pared.sparsity.solution import PruningSolution

Family = Literal["low_rank", "sparse"]  # what a budget is of: ranks, or zeros
FAMILIES: tuple[Family, ...] = ("low_rank", "sparse")
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
    def operations(self) -> Callable[[Sequence[tuple[int, int]], Any], Sequence[Operation]] | None:
        """What it takes to solve for the weights that read one tensor, from their shapes and the options, if known."""
        ...

    @property
    def solve(self) -> "Callable[[Sequence[torch.Tensor], Sequence[Any], Any], Decomposition | PruningSolution] | None":
        """From weights ``(out, in)``, statistics of each and options to what answers every budget, if it does that."""
        ...


def _read(name: str, found: object) -> Method:
    """Return an object of another package as the method of a name.

    Raises:
        ValueError: it is none; says why.
    """
    if not isinstance(found, (LowRankMethod, PruningMethod)):
        raise ValueError(f"expected a LowRankMethod or a PruningMethod, got {found!r}")
    if found.name != name:
        raise ValueError(f"it calls itself {found.name!r}; the two names must be one")
    return found


BUILTIN: dict[str, Method] = {**LOW_RANK, **WIDTHS, **PRUNING}
METHODS: Registry[Method] = Registry("method", GROUP, BUILTIN, _read)


def methods_of(family: Family) -> dict[str, Method]:
    """Return all methods of a family, by name."""
    return {name: method for name, method in METHODS.available().items() if method.family == family}


def method_of(options: Options) -> Method:
    """Return the method that options belong to, by their type.

    Raises:
        ParedError: none does.
    """
    try:
        name = options.owner("method")
    except ValueError as error:
        raise ParedError(f"{error}; expected those of one of {', '.join(METHODS)}") from None
    return METHODS.find(name)
