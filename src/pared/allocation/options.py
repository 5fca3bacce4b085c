"""The options of the allocators: a type each, which belongs to one allocator alone."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pared.allocation.dsa.presets import DEFAULT_OF_RANKS, DEFAULT_OF_ZEROS
from pared.schema.options import Options

MOST = 1 - 1e-6  # the largest sparsity of a unit


class UnitOptions(Options):
    """Options of every allocator of zeros."""

    granularity: Annotated[
        Literal["block", "site"], Field(description="what gets a sparsity of its own: a block, or every site")
    ] = "block"
    by_parameters: Annotated[
        bool, Field(description="whether the mean is over parameters, which makes the size exact, or over units")
    ] = True


class SiteOptions(UnitOptions):
    """Options of an allocator of zeros whose units are sites unless a recipe says otherwise."""

    granularity: Annotated[
        Literal["block", "site"], Field(description="what gets a sparsity of its own: a block, or every site")
    ] = "site"


class ProgramOptions(Options):
    """Options of an allocator by a DSA program."""

    program: Annotated[str, Field(description="a program's text, the FOUND.json of a search, or a packaged one")] = ""
    score_tokens: Annotated[int, Field(ge=0, description="a number of tokens, or 0 for the program's own")] = 0


# Of ranks.


class UniformRanks(Options):
    """Options of ``uniform`` for ranks."""


class RankFraction(Options):
    """Options of ``rank-fraction``."""


class LossRanks(Options):
    """Options of ``loss`` for ranks."""


class GlobalWidths(Options):
    """Options of ``global`` for widths."""


class EffectiveRank(Options):
    """Options of ``effective-rank``."""


class Swift(Options):
    """Options of ``swift``."""


class Sensitivity(Options):
    """Options of ``sensitivity``."""


class SvdLlmV2Ranks(Options):
    """Options of ``svd-llm-v2``."""


class DsaRanks(ProgramOptions):
    """Options of ``dsa`` for ranks."""

    program: Annotated[str, Field(description="a program's text, the FOUND.json of a search, or a packaged one")] = (
        DEFAULT_OF_RANKS
    )


# Of zeros.


class UniformZeros(UnitOptions):
    """Options of ``uniform`` for zeros."""


class Global(SiteOptions):
    """Options of ``global``."""


class Er(SiteOptions):
    """Options of ``er``."""

    @field_validator("granularity")
    @classmethod
    def _sites_alone(cls, value: str) -> str:
        if value != "site":
            raise ValueError(
                "the densities of er and er-plus are those of single weights; granularity can only be site"
            )
        return value


class ErPlus(Er):
    """Options of ``er-plus``."""


class Owl(UnitOptions):
    """Options of ``owl``."""

    multiple: Annotated[float, Field(description="of the mean, above which a score is an outlier")] = 5.0
    width: Annotated[float, Field(description="λ: sparsities differ by up to twice as much")] = 0.08


class AlphaPruning(UnitOptions):
    """Options of ``alphapruning``."""

    epsilon: Annotated[float, Field(ge=0, le=1, description="0 to 1, how far sparsities are from their mean")] = 0.3
    tail: Annotated[
        Literal["xmin_mid", "xmin_peak"], Field(description="where a spectrum's tail begins: the middle, or its peak")
    ] = "xmin_mid"


class DsaZeros(ProgramOptions, UnitOptions):
    """Options of ``dsa`` for zeros."""

    program: Annotated[str, Field(description="a program's text, the FOUND.json of a search, or a packaged one")] = (
        DEFAULT_OF_ZEROS
    )
    legacy_nan_to_zero: Annotated[bool, Field(description="whether what is undefined is 0, as in the code of DSA")] = (
        False
    )


class LossZeros(SiteOptions):
    """Options of ``loss`` for zeros."""

    most: Annotated[float, Field(le=MOST, description="the largest sparsity of a unit, below 1")] = 0.95
