"""All allocators by name: how a budget of ranks or of zeros is spread, those built in and those that packages add."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import TypeVar

from pared.allocation import options as of
from pared.allocation.dsa.presets import PACKAGED
from pared.allocation.ranks.rank_fraction import rank_fraction
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.lazy import deferred
from pared.methods import FAMILIES, Family
from pared.names import called, require_known
from pared.plugins import Registry
from pared.schema.options import Configured, Kind, Options
from pared.schema.plan import Decision, Dense, LowRank, Sparse
from pared.schema.width import Width

GROUP = "pared.allocators"
# What an allocator of a family may require of the evidence, and which decisions it makes.
EVIDENCE: Mapping[Family, frozenset[str]] = {
    "low_rank": frozenset({"cost", "influence", "trial"}),
    "sparse": frozenset({"scores", "losses", "alphas"}),
}
DECISIONS: Mapping[Family, tuple[type[Decision], ...]] = {"low_rank": (LowRank, Dense, Width), "sparse": (Sparse,)}
NOTHING: frozenset[str] = frozenset()
WHAT: Mapping[Family, str] = {"low_rank": "allocation", "sparse": "allocation of zeros"}

C = TypeVar("C", bound=Options, default=Any)
Rule = Callable[[Sequence[Unit], Budget, Evidence, C], Mapping[str, Decision]]


@dataclass(frozen=True)
class Allocator(Configured[C]):
    """A way to spread a budget over units.

    Attributes:
        name: what a recipe calls it. Allocators of different families may have one name.
        summary: what it does, in a line.
        families: of methods whose budgets it spreads: ``low_rank``, ``sparse`` or both.
        config: its options; the type belongs to this allocator alone. One that serves ``sparse`` has
            :class:`pared.allocation.UnitOptions`.
        rule: from units, a budget, evidence and options to a decision for every unit: ``LowRank`` or ``Dense`` for
            ranks, ``Sparse`` for zeros, whose mean over the units is the budget's sparsity.
        requires: fields of the evidence that it reads; shapes are enough if there are none. There are ``cost``,
            ``influence`` and ``trial`` for ranks, ``scores``, ``losses`` and ``alphas`` for zeros.
        widths: whether it also decides widths of the channel groups of the evidence, where the budget asks for that:
            all sites of a group get a ``Width``, or none does.
        ranks: whether it decides ranks, where the budget asks for those.
        bits: whether it decides in how few bits weights are stored, where the budget is one of bytes.
    """

    name: str
    summary: str
    families: frozenset[Family]
    config: type[C]
    rule: Rule[C]
    requires: frozenset[str] = NOTHING
    widths: bool = False
    ranks: bool = True
    bits: bool = False
    kind: ClassVar[Kind] = "allocation"

    def allocate(
        self, units: Sequence[Unit], budget: Budget, evidence: Evidence, config: C | None = None
    ) -> dict[str, Decision]:
        """Return the decision of every unit, by name.

        Args:
            units: what gets a decision each.
            budget: how much may stay.
            evidence: with all that is required.
            config: the options; the defaults if none are given.

        Raises:
            ParedError: the budget cannot be met, or the evidence does not allow it.
        """
        options = self.configured() if config is None else config
        decisions = self.rule(units, budget, evidence, options)
        expected = DECISIONS["low_rank" if budget.sparsity is None else "sparse"]
        expected = expected if budget.structures != "ranks" else tuple(one for one in expected if one is not Width)
        if not isinstance(decisions, Mapping):
            raise ParedError(f"allocation {self.name} gives {decisions!r}; expected a mapping from the name of every "
                             "unit to its decision")  # fmt: skip
        if unknown := sorted(map(str, decisions.keys() - {unit.name for unit in units})):
            raise ParedError(f"allocation {self.name} decides for {unknown[0]!r}, which is no unit; expected "
                             f"{len(units)} names, such as {units[0].name if units else 'none'}")  # fmt: skip
        for unit in units:
            if not isinstance(decision := decisions.get(unit.name), expected):
                raise ParedError(
                    f"allocation {self.name} decides {decision!r} for {unit.name}; expected "
                    f"{' or '.join(one.__name__ for one in expected)}"
                )
        return dict(decisions)


def _rank_fraction(units: Sequence[Unit], budget: Budget, _: Evidence, __: Options) -> dict[str, Decision]:
    if budget.rank_fraction is None:
        raise ParedError(f"allocation rank-fraction needs the fraction; give {called('rank_fraction', '0.33')} instead")
    return rank_fraction(units, budget.rank_fraction, budget.pivoted)


def _of_ranks(
    name: str,
    summary: str,
    config: type[C],
    rule: Rule[C],
    requires: frozenset[str],
    widths: bool = False,
    bits: bool = False,
) -> Allocator[C]:
    return Allocator(name, summary, frozenset({"low_rank"}), config, rule, requires, widths, bits=bits)


def _of_zeros(name: str, summary: str, config: type[C], rule: str, requires: frozenset[str] = NOTHING) -> Allocator[C]:
    rule_of = deferred(f"pared.allocation.layer_rules:{rule}")
    return Allocator(name, summary, frozenset({"sparse"}), config, rule_of, requires)


def _in(module: str) -> Callable[..., Any]:
    """Return the allocator of ranks of a module, which has its name."""
    return deferred(f"pared.allocation.ranks.{module}:{module}")


COST = frozenset({"cost"})

BUILTIN: tuple[Allocator, ...] = (
    _of_ranks("uniform", "the same fraction of every weight", of.UniformRanks, _in("uniform"), NOTHING, True),
    _of_ranks(
        "rank-fraction", "FWSVD's budget, the same fraction of every rank", of.RankFraction, _rank_fraction, NOTHING
    ),
    _of_ranks(
        "loss",
        "the least sum of losses over all weights, dense ones included",
        of.LossRanks,
        _in("loss"),
        COST,
        widths=True,
        bits=True,
    ),
    Allocator(
        "global",
        "FLAP: one threshold over the standardised scores of all channels and heads",
        frozenset({"low_rank"}),
        of.GlobalWidths,
        deferred("pared.allocation.widths.global_widths:global_widths"),
        COST,
        widths=True,
        ranks=False,
    ),
    _of_ranks(
        "effective-rank",
        "D-Rank: by effective rank, with a share of q and k moved to v",
        of.EffectiveRank,
        _in("effective_rank"),
        COST,
    ),
    _of_ranks(
        "swift",
        "Swift-SVD: by loss and influence of the block, eleven mixtures tried on a text",
        of.Swift,
        _in("swift"),
        COST | {"influence", "trial"},
    ),
    _of_ranks(
        "sensitivity",
        "ASVD: every weight at six sizes, by the perplexity each leaves; many evaluations, kept on disk",
        of.Sensitivity,
        _in("sensitivity"),
        COST | {"trial"},
    ),
    _of_ranks(
        "dsa",
        "a DSA program over the spectra of a block: its text, FOUND.json of a search, or a packaged one",
        of.DsaRanks,
        _in("dsa"),
        COST,
    ),
    _of_ranks(
        "svd-llm-v2",
        "within a kind, less is taken where uniform ranks lose more",
        of.SvdLlmV2Ranks,
        _in("svd_llm_v2"),
        COST,
    ),
    _of_zeros("uniform", "the same sparsity everywhere", of.UniformZeros, "by_uniform"),
    _of_zeros(
        "global",
        "one threshold over Wanda's scores of the whole model",
        of.Global,
        "by_threshold",
        frozenset({"scores"}),
    ),
    _of_zeros("er", "Erdős-Rényi: small and flat weights stay denser", of.Er, "by_er"),
    _of_zeros("er-plus", "er with the last weight dense", of.ErPlus, "by_er_plus"),
    _of_zeros("owl", "OWL: blocks with many outlying scores are pruned less", of.Owl, "by_owl", frozenset({"scores"})),
    _of_zeros(
        "alphapruning",
        "AlphaPruning: heavy-tailed spectra are pruned less; needs no data",
        of.AlphaPruning,
        "by_alphapruning",
        frozenset({"alphas"}),
    ),
    _of_zeros(
        "dsa",
        f"a DSA program over Wanda's scores: its text, FOUND.json of a search, or one of {', '.join(PACKAGED)}",
        of.DsaZeros,
        "by_dsa",
        frozenset({"scores"}),
    ),
    _of_zeros(
        "loss",
        "ours: the least sum of expected losses, one threshold in nats; needs a backward pass",
        of.LossZeros,
        "by_loss",
        frozenset({"losses"}),
    ),
)


def _read(name: str, found: Any) -> tuple[Allocator, ...]:
    """Return an object of another package, an allocator or several, as what a name stands for.

    Raises:
        ValueError: it is none; says why.
    """
    allocators = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    for one in allocators:
        if not isinstance(one, Allocator):
            raise ValueError(f"expected a pared.allocation.Allocator, got {one!r}")
        if one.name != name:
            raise ValueError(f"it calls itself {one.name!r}; the two names must be one")
        if not one.families or not one.families <= set(FAMILIES):
            raise ValueError(f"families {sorted(one.families)}: expected some of {', '.join(FAMILIES)}")
        there = frozenset.intersection(*(EVIDENCE[family] for family in one.families))
        if unknown := sorted(one.requires - there):
            raise ValueError(f"requires {', '.join(unknown)}: expected some of {', '.join(sorted(there)) or 'nothing'}")
        base = of.UnitOptions if "sparse" in one.families else Options
        if not (isinstance(one.config, type) and issubclass(one.config, base)):
            raise ValueError(f"expected a subclass of {base.__module__}.{base.__name__} as config, got {one.config}")
    served = [family for one in allocators for family in one.families]
    if len(served) > len(set(served)):
        raise ValueError(f"several allocators of one name serve {max(served, key=served.count)}")
    return allocators


ALLOCATORS: Registry[tuple[Allocator, ...]] = Registry(
    "allocation",
    GROUP,
    {name: tuple(one for one in BUILTIN if one.name == name) for name in dict.fromkeys(one.name for one in BUILTIN)},
    _read,
)


def allocator_of(name: str, family: Family) -> Allocator:
    """Return the allocator that a name stands for where a budget of a family is spread.

    Raises:
        ParedError: there is none; or the package that adds it is broken.
    """
    for one in ALLOCATORS.get(name, ()):
        if family in one.families:
            return one
    require_known(WHAT[family], name, allocators_for(family))
    raise AssertionError(name)


def allocators_for(family: Family) -> dict[str, Allocator]:
    """Return all allocators that spread budgets of a family, by name."""
    every = ALLOCATORS.available().values()
    return {one.name: one for allocators in every for one in allocators if family in one.families}
