"""What a folder of every size says of itself: in which order the one budget takes factors away over the whole model."""

from typing import Annotated, Any

from pydantic import Field, FiniteFloat, NonNegativeInt

from pared.errors import ParedError
from pared.names import called
from pared.schema.base import Strict

FACTORS_FILE = "elastic/factors.safetensors"  # below the folder, so that nothing which loads the largest size reads it


class ElasticSite(Strict):
    """A target module, as far as allocations look at it besides its shape.

    Attributes:
        name: of the module.
        owner: the class of the module it lies in.
        position: which of that module's target modules it is.
        reads: name of the first that reads the same tensor.
    """

    name: str
    owner: str
    position: NonNegativeInt
    reads: str


class ElasticUnit(Strict):
    """What gets one decision at every size.

    Attributes:
        sites: one, or several that share a basis.
        rank: the largest that there are factors for; 0 for what stays dense at every size.
    """

    sites: Annotated[tuple[ElasticSite, ...], Field(min_length=1)]
    rank: NonNegativeInt

    @property
    def name(self) -> str:
        """That of the first site, which owns the basis."""
        return self.sites[0].name


class ElasticSize(Strict):
    """A size that factors are stored for.

    Attributes:
        keep: the fraction of the target parameters that stays.
        parameters: of the target modules.
        loss: what it is predicted to add to the loss, nats a token; None of a method whose losses are not in nats.
    """

    keep: FiniteFloat
    parameters: NonNegativeInt
    loss: FiniteFloat | None = None


class Elastic(Strict):
    """What a folder holds besides its largest size, so that every smaller one can be cut out of it.

    Spectra and factors lie in :data:`FACTORS_FILE`: of every unit with a rank ``NAME.spectrum (R,)``, float64, what
    leaving out each direction costs; and, where a smaller size takes directions that the largest does not store as
    factors, those as ``NAME.down (rank - first, in)`` and ``NAME.up (out, rank - first)``, ``first`` the rank that the
    largest size has of it, 0 where it is dense there. Directions are in the order of what they are worth.

    Attributes:
        allocation: the allocator that spreads the budget of every size.
        options: of it.
        units: in the order in which it is given them.
        sizes: those that are exactly what a compression of its own gives, by falling keep.
        bytes: of spectra and factors.
    """

    allocation: str
    options: dict[str, Any] = Field(default={})
    units: Annotated[tuple[ElasticUnit, ...], Field(min_length=1)]
    sizes: Annotated[tuple[ElasticSize, ...], Field(min_length=1)]
    bytes: NonNegativeInt

    @property
    def least(self) -> float:
        """The smallest keep."""
        return self.sizes[-1].keep

    @property
    def most(self) -> float:
        """The largest keep, that of the folder as it is."""
        return self.sizes[0].keep


def require_size(elastic: Elastic | None, folder: str, keep: float) -> Elastic:
    """Return how sizes are cut out of a folder.

    Args:
        elastic: what its manifest says of that.
        folder: its name, for messages.
        keep: of the size that is wanted.

    Raises:
        ParedError: it holds one size, or no such size.
    """
    if elastic is None:
        raise ParedError(f"{folder} holds one size; a compression with {called('elastic', 'True')} writes one of every "
                         "size")  # fmt: skip
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not 0 < keep <= elastic.most:
        raise ParedError(f"{folder} holds sizes from keep {elastic.least:g} to {elastic.most:g}, got keep {keep}; take "
                         "one of these, or compress to a larger one")  # fmt: skip
    return elastic
