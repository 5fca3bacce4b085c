"""A recipe resolved once: every ``auto`` resolved, every name looked up, and the passes over the blocks as data.

All work on a compression is given the :class:`LowRankSpec` or :class:`SparseSpec`; the recipe is not consulted again.
The type of the spec selects what does the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pared.allocation import Allocator, Budget, ProgramOptions, UnitOptions, allocator_of
from pared.allocation.dsa.presets import SCORE_TOKENS
from pared.errors import ParedError
from pared.lowrank import GradientOptions, LowRankMethod, SharingOptions
from pared.methods import METHODS, Method, methods_of
from pared.schema.options import Options, read_options
from pared.schema.recipe import Calibration, Recipe
from pared.sparsity import NM, PruningMethod, parse

# Fields of a recipe that only one family of methods reads.
ZEROS_ONLY = ("sparsity", "pattern")
LOW_RANK_ONLY = ("keep", "rank_fraction", "storage", "statistics", "refit", "dense_path")

Action = Literal["evidence", "solve", "allocate", "install", "refit"]
Runs = Literal["nothing", "forward", "backward", "backward, then forward"]
HandOn = Literal["dense", "compressed"]
# What runs on the dense model for what an allocation of zeros requires, a pass each.
EVIDENCE_FROM: tuple[tuple[str, Runs], ...] = (("alphas", "nothing"), ("losses", "backward"), ("scores", "forward"))


@dataclass(frozen=True)
class PassSpec:
    """One step of a compression; all but ``allocate`` go over the blocks.

    Attributes:
        action: what is done: collect evidence for the allocation, decompose or prune, decide every site, put in place
            what was decomposed, refit.
        runs: what runs on the calibration tokens.
        hand_on: what later blocks read: what the dense blocks output, or what was made of them.
        reference: whether the dense model runs alongside, for targets.
        installs: whether a solve puts its result in place at once, as the decisions are known.
    """

    action: Action
    runs: Runs = "nothing"
    hand_on: HandOn = "dense"
    reference: bool = False
    installs: bool = False

    def describe(self) -> dict[str, object]:
        """Return it as JSON has it."""
        told: dict[str, object] = {"action": self.action}
        if self.action != "allocate":
            told |= {"runs": self.runs}
        if self.runs.endswith("forward"):
            told |= {"hand_on": self.hand_on, "reference": self.reference}
        return told | ({"installs": self.installs} if self.action == "solve" else {})

    def __str__(self) -> str:
        if self.action == "allocate":
            return "allocate"
        how = "no data" if self.runs == "nothing" else self.runs
        behind = ", behind the compressed blocks" if self.hand_on == "compressed" else ""
        beside = ", with the dense model as reference" if self.reference else ""
        verb = "solve and install" if self.action == "solve" and self.installs else self.action
        return f"{verb} ({how}{behind}{beside})"


@dataclass(frozen=True)
class _Spec:
    """What the specs of all families have.

    Attributes:
        recipe: that was resolved, for the record.
        method: that does the work.
        config: options of the method.
        allocator: that spreads the budget.
        allocation_config: options of the allocator.
    """

    recipe: Recipe
    method: Method
    config: Options
    allocator: Allocator
    allocation_config: Options

    def requires(self, shapes: Sequence[tuple[int, int]]) -> frozenset[str]:
        """Return the statistics of the forward pass that the method reads, from the shapes of what reads one tensor."""
        return self.method.requires(shapes, self.config)

    @property
    def walked(self) -> bool:
        """Whether the method reads statistics of the forward pass."""
        return bool(self.requires([(1, 1)]))

    @property
    def gradients(self) -> frozenset[str]:
        """Names of the statistics of a backward pass that the method reads."""
        return self.method.gradients(self.config)

    @property
    def loss(self) -> Literal["sampled", "labels"]:
        """How the labels of a backward pass are chosen."""
        return self.config.loss if isinstance(self.config, GradientOptions) else "sampled"

    @property
    def method_calibrated(self) -> bool:
        """Whether the method needs data at all."""
        return self.walked or bool(self.gradients)

    @property
    def decided_from_data(self) -> bool:
        """Whether more than shapes decides what every site keeps."""
        return bool(self.allocator.requires)

    @property
    def calibration(self) -> Calibration:
        """What is calibrated on."""
        return self.recipe.calibration

    @property
    def group_size(self) -> int:
        """How many neighbouring blocks are compressed together."""
        return self.config.group_size if isinstance(self.config, SharingOptions) else 1


@dataclass(frozen=True)
class LowRankSpec(_Spec):
    """A low-rank compression.

    Attributes:
        budget: how much may stay, and what a rank costs.
        statistics: when they are collected.
        refit: the stage that follows.
        dense_path: share of the dense model's outputs in targets.
    """

    method: LowRankMethod
    budget: Budget
    statistics: Literal["once", "sequential"]
    refit: Literal["off", "update", "sequential", "sequential-dense-block"]
    dense_path: float

    @property
    def sharing(self) -> str:
        """Which groups of neighbouring blocks share a basis."""
        return self.config.sharing if isinstance(self.config, SharingOptions) else "none"

    @property
    def gradient_share(self) -> float:
        """The share of the windows that go through a backward pass."""
        from pared.calibration.statistics import backward_data_fraction  # torch, which a dry run need not wait for

        return backward_data_fraction(self.gradients)

    @property
    def influence(self) -> bool:
        """Whether the allocation looks at how much every block changes the hidden states."""
        return "influence" in self.allocator.requires

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on a text: for statistics, a refit, or the allocation."""
        return self.method_calibrated or self.refit != "off" or self.influence

    @property
    def tries(self) -> bool:
        """Whether the allocation tries what it proposes, on windows that are not calibrated on."""
        return "trial" in self.allocator.requires

    @property
    def sequential(self) -> bool:
        """Whether statistics are collected behind the compressed prefix; a method without any has none to collect."""
        return self.statistics == "sequential" and self.walked

    @property
    def has_targets(self) -> bool:
        """Whether a stage follows whose targets may be the dense model's outputs."""
        return self.sequential or self.refit != "off"

    @property
    def reference(self) -> bool:
        """Whether the dense model runs alongside where there are targets."""
        return self.has_targets and self.dense_path > 0

    @property
    def solving(self) -> Runs:
        """What runs on the dense model for the statistics of the method and of the allocation."""
        if self.influence and self.gradients:
            return "backward, then forward"
        return "forward" if self.influence else self.solving_for_method

    @property
    def solving_for_method(self) -> Runs:
        """What runs on the dense model for the statistics of the method."""
        if not self.method_calibrated:
            return "nothing"
        if not self.gradients:
            return "forward"
        return "backward, then forward" if self.gradient_share < 1 else "backward"

    def passes(self, ranks_known: bool | None = None) -> tuple[PassSpec, ...]:
        """Return the steps, in order.

        Args:
            ranks_known: whether the ranks are known before anything is solved; unless the model says otherwise where
                shapes alone decide them and nothing needs the decompositions of all sites.
        """
        if ranks_known is None:
            grouped = self.group_size > 1 and self.sharing != "none"
            ranks_known = not (self.decided_from_data or grouped or self.refit != "off")
        refit = () if self.refit == "off" else (self._refit_pass(),)
        # Gradients are of the dense model, so that behind compressed blocks only what sites read is collected again.
        behind: Runs = "backward, then forward" if self.gradients and ranks_known else "forward"
        again = PassSpec("solve", behind, "compressed", self.dense_path > 0, installs=True)
        if ranks_known:
            once = PassSpec("solve", self.solving, installs=True)
            return (PassSpec("allocate"), again if self.sequential else once, *refit)
        first = PassSpec("solve", self.solving)
        return (first, PassSpec("allocate"), again if self.sequential else PassSpec("install"), *refit)

    def _refit_pass(self) -> PassSpec:
        hand_on: HandOn = "dense" if self.refit == "update" else "compressed"
        return PassSpec("refit", "forward", hand_on, self.dense_path > 0)

    def describe(self) -> dict[str, object]:
        """Return what the recipe's ``auto`` stands for, for the record."""
        return {
            "allocation": self.allocator.name,
            **self.allocation_config.model_dump(),
            "storage": "pivoted" if self.budget.pivoted else "factors",
            "statistics": self.statistics,
            "refit": self.refit,
            **({"dense_path": self.dense_path} if self.has_targets else {}),
        }


@dataclass(frozen=True)
class SparseSpec(_Spec):
    """A compression that makes weights zero.

    Attributes:
        sparsity: the fraction of zeros.
        pattern: N:M, if zeros follow one.
    """

    method: PruningMethod
    allocation_config: UnitOptions
    sparsity: float
    pattern: NM | None

    tries = False  # no allocation of zeros does

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on a text: for statistics, or the allocation."""
        return self.method_calibrated or bool(self.allocator.requires & {"scores", "losses"})

    @property
    def granularity(self) -> str:
        """What gets one sparsity: a ``block`` or a ``site``."""
        return self.allocation_config.granularity

    @property
    def budget(self) -> Budget:
        """How much of the target modules may stay."""
        return Budget(1 - self.sparsity, sparsity=self.sparsity)

    def passes(self) -> tuple[PassSpec, ...]:
        """Return the steps, in order."""
        evidence = (PassSpec("evidence", runs) for kind, runs in EVIDENCE_FROM if kind in self.allocator.requires)
        prune = PassSpec("solve", "forward", "compressed") if self.method_calibrated else PassSpec("solve")
        return (*evidence, PassSpec("allocate"), replace(prune, installs=True))

    def describe(self) -> dict[str, object]:
        """Return what the recipe's ``auto`` stands for, for the record."""
        return {"allocation": self.allocator.name, **self.allocation_config.model_dump()}


CompressionSpec = LowRankSpec | SparseSpec


def resolve(recipe: Recipe) -> CompressionSpec:
    """Resolve what a recipe leaves open, and look up what it names.

    Raises:
        ParedError: unknown method, allocation or option, a value of another type, a field that the method does not
            read, or no budget.
    """
    method = method_of(recipe)
    if isinstance(method, LowRankMethod):
        return _resolve_low_rank(recipe, method)
    assert isinstance(method, PruningMethod), method.family
    return _resolve_sparse(recipe, method)


def resolve_low_rank(recipe: Recipe) -> LowRankSpec:
    """Resolve a recipe that must be of a low-rank method.

    Raises:
        ParedError: as :func:`resolve`, or its method is of another family.
    """
    method = method_of(recipe)
    if not isinstance(method, LowRankMethod):
        raise ParedError(f"method {method.name} prunes; a low-rank method is needed here: "
                         f"{', '.join(methods_of('low_rank'))}")  # fmt: skip
    return _resolve_low_rank(recipe, method)


def resolve_sparse(recipe: Recipe) -> SparseSpec:
    """Resolve a recipe that must be of a pruning method.

    Raises:
        ParedError: as :func:`resolve`, or its method is of another family.
    """
    method = method_of(recipe)
    if not isinstance(method, PruningMethod):
        raise ParedError(
            f"method {method.name} does not prune; here one of {', '.join(methods_of('sparse'))} is needed"
        )
    return _resolve_sparse(recipe, method)


def method_of(recipe: Recipe) -> Method:
    """Return the method a recipe names.

    Raises:
        ParedError: there is none of that name, or the package that adds it is broken.
    """
    return METHODS.find(recipe.method)


def _resolve_low_rank(recipe: Recipe, method: LowRankMethod) -> LowRankSpec:
    _refuse_fields(recipe, ZEROS_ONLY, "its budget is keep or rank_fraction")
    statistics = method.statistics(recipe.keep) if recipe.statistics == "auto" else recipe.statistics
    refit = method.refit(recipe.keep) if recipe.refit == "auto" else recipe.refit
    config = read_options(method.config, recipe.options, f"method {method.name}")
    name = "rank-fraction" if recipe.rank_fraction is not None else _allocation_name(recipe, method)
    allocator = allocator_of(name, "low_rank")
    pivoted = method.pivoted if recipe.storage == "auto" else recipe.storage == "pivoted"
    spec = LowRankSpec(
        recipe=recipe,
        method=method,
        config=config,
        allocator=allocator,
        allocation_config=_with_program(allocator.configured(recipe.allocation_options), 1),
        budget=Budget(recipe.keep, pivoted, recipe.rank_fraction),
        statistics=statistics,  # type: ignore[arg-type] # a method's own is one of the two
        refit=refit,  # type: ignore[arg-type]
        dense_path=method.dense_path if recipe.dense_path == "auto" else recipe.dense_path,
    )
    if recipe.dense_path not in ("auto", 0) and not spec.has_targets:
        raise ParedError(
            f"dense_path {recipe.dense_path:g} needs targets: a refit (--refit), or sequential statistics of a method "
            f"that collects any; method {recipe.method} has statistics {statistics} and refit {refit} here"
        )
    return spec


def _resolve_sparse(recipe: Recipe, method: PruningMethod) -> SparseSpec:
    _refuse_fields(recipe, LOW_RANK_ONLY, "its budget is sparsity or pattern")
    if recipe.sparsity is None and recipe.pattern is None:
        raise ParedError(
            f"method {recipe.method} prunes: name a sparsity, the fraction of zeros (--sparsity 0.5), or a pattern "
            "(--pattern 2:4)"
        )
    config = read_options(method.config, recipe.options, f"method {method.name}")
    allocator = allocator_of(_allocation_name(recipe, method), "sparse")
    allocation_config = _with_program(allocator.configured(recipe.allocation_options), SCORE_TOKENS)
    assert isinstance(allocation_config, UnitOptions)
    pattern = None if recipe.pattern is None else pattern_of(recipe.pattern)
    sparsity = recipe.sparsity if pattern is None else pattern.sparsity
    assert sparsity is not None
    return SparseSpec(
        recipe=recipe,
        method=method,
        config=config,
        allocator=allocator,
        allocation_config=allocation_config,
        sparsity=sparsity,
        pattern=pattern,
    )


def _refuse_fields(recipe: Recipe, names: tuple[str, ...], hint: str) -> None:
    """Refuse what a recipe sets and its method does not read."""
    for name in names:
        if (value := getattr(recipe, name)) != Recipe.model_fields[name].default:
            raise ParedError(f"method {recipe.method} does not take {name} (got {value!r}); {hint}")


def _allocation_name(recipe: Recipe, method: Method) -> str:
    return method.allocation if recipe.allocation == "auto" else recipe.allocation


def pattern_of(text: str) -> NM:
    """Return an N:M pattern.

    Raises:
        ParedError: there is no such pattern, or it keeps everything.
    """
    kept, _, group = text.partition(":")
    if int(kept) > int(group):
        raise ParedError(f"pattern {text} keeps {kept} of every {group}; did you mean {group}:{kept}?")
    try:
        found = parse(text)
    except ValueError as error:
        raise ParedError(str(error)) from None
    if found.sparsity == 0:
        raise ParedError(f"pattern {text} keeps everything; 2:4 makes half of the weights zero")
    assert isinstance(found, NM)
    return found


def _with_program(config: Options, tokens: int) -> Options:
    """Return options with the program itself in place of the file that holds it, so that the record is whole."""
    if not isinstance(config, ProgramOptions):
        return config
    from pared.allocation.dsa import named

    program, tokens = named(config.program, tokens)
    if not config.program.endswith(".json"):
        return config
    return config.model_copy(update={"program": str(program), "score_tokens": config.score_tokens or tokens})
