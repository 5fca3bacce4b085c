"""From a recipe to a spec, once: every name looked up, every ``auto`` resolved, what is impossible refused."""

from pared.allocation import Budget, ProgramOptions, UnitOptions, allocator_of, allocators_for
from pared.allocation.dsa.presets import SCORE_TOKENS
from pared.data.uses import with_use
from pared.engine.spec.nested import nested, require_nested
from pared.engine.spec.specs import CompressionSpec, ExpertSpec, LowRankSpec, SparseSpec
from pared.errors import ParedError
from pared.lowrank import DrawnOptions, LowRankMethod
from pared.methods import METHODS, Method, methods_of
from pared.names import called
from pared.schema.options import Options
from pared.schema.recipe import Recipe
from pared.sparsity import NM, PruningMethod, parse

# Fields of a recipe that only one family of methods reads.
MULTIPLE_OF = 64  # of widths: tiles of matrix units and blocks of quantised formats divide it
ZEROS_ONLY = ("sparsity", "pattern")
FEW_BITS = ("quantize", "rounding")
BYTES = ("keep_bytes", "target_bytes")
NOT_OF_EXPERTS = (*FEW_BITS, *BYTES, "rank_fraction", "sparsity", "pattern", "skip", "heads", "multiple_of", "storage",
                  "elastic", "statistics", "refit", "dense_path", "refine")  # fmt: skip
OF_EXPERTS = ("loss", "labels_per_token", "gradient_clip")  # options of a method of layers that experts have too
LOW_RANK_ONLY = ("keep", *BYTES, "rank_fraction", "structures", "heads", "multiple_of", "storage", "elastic",
                 "statistics", "refit", "dense_path")  # fmt: skip


def resolve(recipe: Recipe) -> CompressionSpec:
    """Resolve what a recipe leaves open, and look up what it names.

    Raises:
        ParedError: unknown method, allocation or option, a value of another type, a field that the method does not
            read, or no budget.
    """
    recipe, method = with_use(recipe), method_of(recipe)
    if isinstance(method, LowRankMethod):
        return _resolve_experts(recipe, method) if _takes_experts(recipe, method) else _resolve_low_rank(recipe, method)
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
    if _takes_experts(recipe, method):
        raise ParedError("structures experts takes whole experts out, and layers are to be decided here; take "
                         f"{called('structures', 'ranks')} of another method, or of loss-optimal")  # fmt: skip
    return _resolve_low_rank(with_use(recipe), method)


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
    return _resolve_sparse(with_use(recipe), method)


def method_of(recipe: Recipe) -> Method:
    """Return the method a recipe names.

    Raises:
        ParedError: there is none of that name, or the package that adds it is broken.
    """
    return METHODS.find(recipe.method)


def _takes_experts(recipe: Recipe, method: LowRankMethod) -> bool:
    """Whether whole experts are to be taken out.

    Raises:
        ParedError: the method does nothing else, and something else is asked for.
    """
    structures = _structures(recipe, method)
    if method.experts is not None and method.solve is None and method.widths is None and structures != "experts":
        raise ParedError(f"method {recipe.method} takes whole experts out, got structures {structures}; leave it out")
    return structures == "experts"


def _structures(recipe: Recipe, method: LowRankMethod) -> str:
    return method.structures(recipe.keep) if recipe.structures == "auto" else recipe.structures


def _resolve_low_rank(recipe: Recipe, method: LowRankMethod) -> LowRankSpec:
    _refuse_fields(recipe, ZEROS_ONLY, "its budget is keep or rank_fraction")
    asked = nested(recipe) if recipe.elastic else recipe
    statistics = method.statistics(recipe.keep) if asked.statistics == "auto" else asked.statistics
    refit = method.refit(recipe.keep) if asked.refit == "auto" else asked.refit
    config = method.configured(recipe.options)
    name = "rank-fraction" if recipe.rank_fraction is not None else _allocation_name(recipe, method)
    allocator = allocator_of(name, "low_rank")
    pivoted = _is_pivoted(asked, method)
    spec = LowRankSpec(
        recipe=recipe,
        method=method,
        config=config,
        allocator=allocator,
        allocation_config=_with_program(allocator.configured(recipe.allocation_options), 1),
        budget=Budget(
            recipe.keep,
            pivoted,
            recipe.rank_fraction,
            structures=_structures(recipe, method),  # type: ignore[arg-type]
            multiple_of=recipe.multiple_of or MULTIPLE_OF,
            form=recipe.quantize,
        ),
        statistics=statistics,  # type: ignore[arg-type] # a method's own is one of the two
        refit=refit,  # type: ignore[arg-type]
        dense_path=method.dense_path if recipe.dense_path == "auto" else recipe.dense_path,
    )
    # A method that would decide widths too by itself leaves them where the rest of the recipe is of ranks.
    ranks_alone = recipe.elastic or allocator.name != method.allocation
    if recipe.structures == "auto" and spec.structures == "mixed" and (ranks_alone or _why_no_widths(spec)):
        spec = spec.with_structures("ranks")
    _require_widths(spec)
    _require_bits(spec)
    _require_drawn(spec)
    if recipe.elastic:
        require_nested(spec)
    if recipe.dense_path not in ("auto", 0) and not spec.has_targets:
        raise ParedError(
            f"dense_path {recipe.dense_path:g} needs targets: a {called('refit')}, or sequential statistics of a "
            f"method that collects any; method {recipe.method} has statistics {statistics} and refit {refit} here"
        )
    return spec


def _require_bits(spec: LowRankSpec) -> None:
    """Refuse what few bits, or a budget of bytes, do not go with.

    Raises:
        ParedError: says what.
    """
    recipe = spec.recipe
    if spec.quantized and spec.group_size > 1 and spec.sharing != "none":
        raise ParedError("bases that blocks share are not stored in few bits; leave out group_size, or take one of "
                         f"parameters without {called('quantize')}")  # fmt: skip
    if not recipe.of_bytes:
        return
    if recipe.quantize is not None:
        raise ParedError(f"{recipe.budget} decides the bits of every weight, got quantize {recipe.quantize} for all; "
                         "leave one of them out")  # fmt: skip
    if not spec.allocator.bits:
        having = [name for name, one in allocators_for("low_rank").items() if one.bits]
        raise ParedError(f"{recipe.budget} needs an allocation that decides bits, got {spec.allocator.name}; those "
                         f"that do: {', '.join(having)}")  # fmt: skip


def _is_pivoted(recipe: Recipe, method: LowRankMethod) -> bool:
    """Return whether low-rank weights are stored by their pivots.

    Raises:
        ParedError: that is asked for, and few bits.
    """
    if recipe.quantize is None and not recipe.of_bytes:
        return method.pivoted if recipe.storage == "auto" else recipe.storage == "pivoted"
    if recipe.storage == "pivoted":
        raise ParedError(f"storage pivoted cannot be {recipe.quantize or 'in few bits'}: coefficients of pivots do "
                         f"not bear rounding; take {called('storage', 'factors')}")  # fmt: skip
    return False


def _resolve_experts(recipe: Recipe, method: LowRankMethod) -> ExpertSpec:
    """Resolve a recipe whose mixtures are to lose experts.

    Raises:
        ParedError: its method has no score of experts, or it sets what only layers have.
    """
    if method.experts is None:
        having = [name for name, one in methods_of("low_rank").items() if getattr(one, "experts", None)]
        raise ParedError(f"method {recipe.method} has no score of experts, got structures experts; those with one: "
                         f"{', '.join(having)}")  # fmt: skip
    name = "uniform" if recipe.allocation == "auto" else recipe.allocation
    if name != "uniform":
        raise ParedError(f"allocation {name} decides layers one by one, got structures experts: every layer keeps as "
                         "many, so that the architecture stays a plain one; take uniform")  # fmt: skip
    for field in NOT_OF_EXPERTS:
        if (value := getattr(recipe, field)) != Recipe.model_fields[field].default:
            raise ParedError(f"structures experts does not take {field} (got {value!r}): it is of layers that are made "
                             "smaller or trained, and experts go whole; leave it out")  # fmt: skip
    config, default = method.configured(recipe.options), method.config()
    for option in type(config).model_fields if method.solve is not None else ():
        if option not in OF_EXPERTS and getattr(config, option) != getattr(default, option):
            raise ParedError(f"option {option} of method {recipe.method} is of layers, got structures experts, which "
                             f"read {' and '.join(OF_EXPERTS)} alone; leave it out")  # fmt: skip
    allocator = allocator_of(name, "low_rank")
    spec = ExpertSpec(recipe, method, config, allocator, allocator.configured(recipe.allocation_options))
    _require_drawn(spec)
    return spec


def _require_drawn(spec: LowRankSpec | ExpertSpec) -> None:
    """Refuse several labels a token where labels are not drawn, and options of gradients where there are none.

    Raises:
        ParedError: says what.
    """
    idle = isinstance(spec.config, DrawnOptions) and not spec.method.gradients(spec.config)
    for option, field in DrawnOptions.model_fields.items() if idle else ():
        if (given := getattr(spec.config, option)) != field.default:
            raise ParedError(f"option {option} of method {spec.method.name} applies to gradients, got {given}, and "
                             "output_weighting none computes none; leave it out, or weigh outputs")  # fmt: skip
    if spec.labels_per_token > 1 and spec.loss == "labels":
        raise ParedError(f"option labels_per_token of method {spec.method.name}: got {spec.labels_per_token} with loss "
                         "labels, and the text has one label a token; take loss sampled, or leave it out")  # fmt: skip


def _require_widths(spec: LowRankSpec) -> None:
    """Refuse what a budget of widths does not go with.

    Raises:
        ParedError: says what.
    """
    recipe, structures = spec.recipe, spec.budget.structures
    if spec.method.solve is None and structures != "widths":
        having = [name for name, one in methods_of("low_rank").items() if one.solve is not None]
        raise ParedError(f"method {recipe.method} takes channels out and lowers no rank, got structures {structures}; "
                         f"those of ranks: {', '.join(having)}")  # fmt: skip
    if not spec.allocator.ranks and structures != "widths":
        raise ParedError(f"allocation {spec.allocator.name} decides widths alone, got structures {structures}: give "
                         f"{called('structures', 'widths')} too")  # fmt: skip
    if structures == "ranks":
        if recipe.multiple_of is not None:
            raise ParedError(f"multiple_of {recipe.multiple_of} is of widths, and here ranks are decided: "
                             f"give {called('structures', 'mixed')} too")  # fmt: skip
        if recipe.heads == "on":
            raise ParedError(f"heads are taken out with widths, and here ranks are decided: give "
                             f"{called('structures', 'mixed')} too")  # fmt: skip
        return
    if why := _why_no_widths(spec):
        raise ParedError(why)


def _why_no_widths(spec: LowRankSpec) -> str:
    """Return why a budget with widths does not go with the rest of a recipe; nothing where it does."""
    recipe, structures = spec.recipe, spec.budget.structures
    if spec.method.widths is None:
        having = [name for name, one in methods_of("low_rank").items()
                  if getattr(one, "widths", None) and (structures == "widths" or one.solve is not None)]  # fmt: skip
        return (f"method {recipe.method} has ranks alone, got structures {structures}; those with widths: "
                f"{', '.join(having)}")  # fmt: skip
    if not spec.allocator.widths:
        having = [name for name, one in allocators_for("low_rank").items() if one.widths]
        return (f"allocation {spec.allocator.name} decides ranks alone, got structures {structures}; those that decide "
                f"widths: {', '.join(having)}")  # fmt: skip
    if spec.group_size > 1 and spec.sharing != "none":
        return (f"structures {structures} and bases that blocks share cannot be in one budget; leave out group_size, "
                f"or take {called('structures', 'ranks')}")  # fmt: skip
    if spec.refit != "off":
        return (f"refit {spec.refit} fits factors, got structures {structures}, whose weights are fitted as they are "
                f"made; take sequential statistics ({called('statistics', 'sequential')}) without a refit")  # fmt: skip
    if recipe.of_bytes:
        return f"{recipe.budget} decides ranks and bits, got structures {structures}; take ranks"
    return ""


def _resolve_sparse(recipe: Recipe, method: PruningMethod) -> SparseSpec:
    _refuse_fields(recipe, LOW_RANK_ONLY, "its budget is sparsity or pattern")
    _refuse_fields(recipe, FEW_BITS, "what it leaves of weights is stored as it is")
    if recipe.sparsity is None and recipe.pattern is None:
        raise ParedError(
            f"method {recipe.method} prunes: name a sparsity, the fraction of zeros ({called('sparsity', '0.5')}), or "
            f"a pattern ({called('pattern', '2:4')})"
        )
    config = method.configured(recipe.options)
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
