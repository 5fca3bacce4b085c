"""What a compression takes is added up from what it computes, and each operation is given a time by a machine."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from pared.engine.allocate import anatomy_of, plan_from_shapes
from pared.engine.cost import measured
from pared.engine.cost.channels import groups_by_shape, with_widths
from pared.engine.cost.measured import WEEK, Measured
from pared.engine.cost.passes import Passes, compressed
from pared.engine.cost.primitives import LIMITS, prepared
from pared.engine.cost.published import H100
from pared.engine.cost.rates import beside
from pared.engine.cost.sizes import Tokens
from pared.engine.cost.stages import Stages, Work, seconds_of, stages_of
from pared.engine.cost.traced import trace
from pared.engine.spec import resolve
from pared.errors import ParedError
from pared.lowrank.operations import factors
from pared.methods import METHODS, Method
from pared.operations import KINDS, Operation, product
from pared.schema.recipe import Recipe
from pared.sparsity.pattern import Unstructured
from pared.structure.channels import find_channels
from pared.structure.probe import probe, probe_shapes
from pared.widths import Channels, GroupLayers
from pared.widths.operations import ordered, weight_that_reads

BLOCKS, WIDTH, INNER, KEY_VALUE, TOKENS = 4, 64, 160, 32, Tokens(windows=32, length=64, batch=4)
SITES = 2 * WIDTH**2 + 2 * WIDTH * KEY_VALUE + 3 * WIDTH * INNER  # weights of a block
SHAPES = [[(24, 40), (16, 40)], [(40, 24)], [(24, 24), (40, 24)]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def stages(model: transformers.PreTrainedModel, tokens: Tokens = TOKENS, **fields: Any) -> tuple[Stages, list[str]]:
    return stages_of(work_of(model, tokens, **fields))


def work_of(model: transformers.PreTrainedModel, tokens: Tokens = TOKENS, **fields: Any) -> Work:
    recipe = Recipe(**fields)
    spec, anatomy = resolve(recipe), probe_shapes(model, anatomy_of(model, recipe))
    plan = with_widths(plan_from_shapes(model, spec), anatomy, spec, groups_by_shape(anatomy, spec))
    calibrated = tokens if spec.calibrated else None
    return Work(model, anatomy, spec, plan, calibrated, None, "bfloat16")


def flops(operations: Any, *kinds: str) -> float:
    return sum(one.flops * one.times for one in operations if one.kind in kinds)


class _Heavy(TorchDispatchMode):
    """Counts products by their flops, and factorisations by their widths."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.widths = 0.0, Counter[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm":
            self.flops += 2.0 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name in ("linalg_cholesky_ex", "_linalg_eigh"):
            kind = "cholesky" if "cholesky" in name else "eigh"
            self.widths[kind, int(args[0].shape[-1])] += 1
        return func(*args, **(kwargs or {}))


def statistics_of(method: Method, config: Any, shapes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    """Return statistics of weights that read one tensor, which is shared as it is in a run."""
    width = shapes[0][1]
    x_TN = torch.randn(200, width, dtype=torch.float64)
    found = []
    gram_NN, energy_N = x_TN.T @ x_TN, x_TN.square().sum(dim=0)
    for out, _ in shapes:
        y_TO = torch.randn(200, out, dtype=torch.float64)
        every = {
            "gram": gram_NN, "mean_gram": gram_NN, "output_gram": y_TO.T @ y_TO, "magnitude": energy_N,
            "energy": energy_N, "fisher": energy_N, "output_gradient_full": y_TO.T @ y_TO,
            "output_gradient_diagonal": y_TO.square().sum(dim=0),
        }  # fmt: skip
        names = method.requires(shapes, config) | method.gradients(config)
        found.append({name: every[name] for name in names})
    return found


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [("svd", {}), ("fwsvd", {}), ("asvd", {}), ("svd-llm", {}), ("basis-sharing", {}), ("loss-optimal", {}),
     ("loss-optimal", {"output_weighting": "diagonal"})],
    ids=str,
)  # fmt: skip
def test_a_low_rank_method_computes_what_it_declares(
    name: str, options: dict[str, Any], shapes: list[tuple[int, int]]
) -> None:
    method: Any = METHODS[name]
    config = method.configured(options)
    given = statistics_of(method, config, shapes)
    weights = [torch.randn(shape) for shape in shapes]
    with _Heavy() as seen:
        made = [method.solve([W_ON], [own], config) for W_ON, own in zip(weights, given, strict=True)]
    declared = method.operations(shapes, config)
    assert seen.flops == flops(declared, "product")
    widths = Counter((one.kind.removeprefix("plain "), one.sizes[0]) for one in declared if one.kind != "product")
    assert seen.widths == widths
    for shape, found in zip(shapes, made, strict=True):
        with _Heavy() as cut:
            found.factors(8)
        assert cut.flops == flops(factors(shape, 8, config), "product")


def test_sparsegpt_factors_the_gram_once_for_all_that_read_one_input() -> None:
    method: Any = METHODS["sparsegpt"]
    config, shapes = method.configured({"block": 8}), [(24, 40), (16, 40)]
    given = statistics_of(method, config, shapes)
    with _Heavy() as seen:
        for shape, own in zip(shapes, given, strict=True):
            method.solve([torch.randn(shape)], [own], config).realize(Unstructured(0.5))
    declared = method.operations(shapes, config)
    assert seen.widths == Counter((one.kind, one.sizes[0]) for one in declared if one.kind == "cholesky")
    assert [one.sizes for one in declared if one.kind == "sweep"] == [(24, 40, 8), (16, 40, 8)]


def test_a_block_computes_two_operations_a_weight_and_token_and_twice_that_on_the_way_back(
    model: transformers.PreTrainedModel,
) -> None:
    found = trace(model, anatomy_of(model, Recipe()), 4, 64, torch.bfloat16, back=True)
    for block in found.blocks:
        assert flops(block.forward, "product") == 2 * 4 * 64 * SITES
        assert flops(block.back, "product") == 2 * 2 * 4 * 64 * SITES
        assert [one.sizes for one in block.forward if one.kind == "attention"] == [(4, 4, 64, 16)]
    assert flops(found.head.forward, "product") == 2 * 4 * 64 * 500 * WIDTH


def test_a_long_text_is_traced_on_fewer_tokens_and_counts_whole(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trace(model, anatomy_of(model, Recipe()), 4, 256, torch.bfloat16).blocks[0].forward
    monkeypatch.setattr("pared.engine.cost.traced.NUMBERS", 64 * INNER)
    part = trace(model, anatomy_of(model, Recipe()), 4, 256, torch.bfloat16).blocks[0].forward
    assert flops(part, "product", "attention") == flops(whole, "product", "attention")
    moved = [sum(one.bytes * one.times for one in found if one.kind == "call") for found in (whole, part)]
    assert moved[1] == pytest.approx(moved[0], rel=0.1)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_family_is_traced_or_refused_by_name(family: str) -> None:
    made = TINY_MODELS[family]().to("meta")
    anatomy = anatomy_of(made, Recipe())
    if "moe" in family:  # a router looks at values
        with pytest.raises(ParedError, match=f"{type(made).__name__} does not run on shapes alone"):
            trace(made, anatomy, 2, 8, torch.float32)
        return
    found = trace(made, anatomy, 2, 8, torch.float32)
    assert all(flops(block.forward, "product") > 0 for block in found.blocks)


@pytest.mark.parametrize("weighting", ["full", "diagonal"])
def test_channels_are_put_in_order_by_what_is_declared(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = METHODS["loss-optimal"]
    config, out, width = method.configured({"output_weighting": weighting}), 24, 40
    (given,) = statistics_of(method, config, [(out, width)])
    weight = torch.randn(out, width)
    found = method.widths(GroupLayers(weight, given), config)
    asked: list[torch.Tensor] = []

    def weighted(W_ON: torch.Tensor, _: torch.Tensor, L_OO: torch.Tensor, **__: Any) -> Channels:
        asked.append(L_OO[:, None] * W_ON if L_OO.ndim == 1 else L_OO.T @ W_ON.double())
        return found

    monkeypatch.setattr("pared.widths.rules.remove_channels", weighted)
    others = {name: value.clone() for name, value in given.items()}  # of which no factor is remembered
    with _Heavy() as seen:
        method.widths(GroupLayers(weight, others), config)
    declared = ordered((out, width), config, 16)
    assert len(asked) == 1
    assert seen.flops == flops(declared, "product")
    assert seen.widths == Counter((one.kind, one.sizes[0]) for one in declared if one.kind == "cholesky")
    assert [one.sizes for one in declared if one.kind == "channels"] == [(out, width, 16)]
    with _Heavy() as cut:
        found.weight(16)
    assert cut.flops == flops(weight_that_reads((out, width), 16), "product")


@pytest.mark.parametrize("family", TINY_MODELS)
def test_channel_groups_by_shape_are_those_that_are_proved(family: str) -> None:
    made = TINY_MODELS[family]()
    anatomy, calls = probe(made, anatomy_of(made, Recipe()))
    proved = find_channels(anatomy.blocks(made), anatomy, calls).groups
    by_shape = groups_by_shape(anatomy, resolve(Recipe(method="loss-optimal", structures="mixed")))
    assert [group.name for group in by_shape] == [group.name for group in proved]
    assert [group.parameters_each for group in by_shape] == [group.parameters_each for group in proved]
    assert groups_by_shape(anatomy, resolve(Recipe(method="loss-optimal", structures="ranks"))) == ()


def test_widths_are_put_in_order_once_for_every_mlp_and_run_narrower(model: transformers.PreTrainedModel) -> None:
    found, unknown = stages(model, method="loss-optimal", keep=0.8, structures="mixed", multiple_of=16)
    assert not unknown
    assert [one.sizes for one in found["solve"] if one.kind == "channels"] == [(WIDTH, INNER, 0)] * BLOCKS
    alone, _ = stages(model, method="loss-optimal", keep=0.9, structures="widths", multiple_of=16)
    assert not [one for one in alone["solve"] if one.kind in ("eigh", "plain eigh")]
    ranks, _ = stages(model, method="loss-optimal", keep=0.8, structures="ranks")
    assert _all(found["solve"]) > _all(ranks["solve"])


def test_behind_compressed_blocks_channels_are_ordered_down_to_the_width(model: transformers.PreTrainedModel) -> None:
    found, _ = stages(
        model, method="loss-optimal", keep=0.8, structures="mixed", multiple_of=16, statistics="sequential"
    )
    least = [one.sizes[2] for one in found["solve"] if one.kind == "channels"]
    assert least == [0] * BLOCKS + [128] * BLOCKS
    known, unknown = (Operation("channels", (WIDTH, INNER, width)) for width in (128, 0))
    assert known.flops < unknown.flops


def test_a_block_of_narrower_layers_computes_what_its_parameters_do(model: transformers.PreTrainedModel) -> None:
    recipe = Recipe(method="loss-optimal", keep=0.9, structures="widths", multiple_of=16)
    spec, anatomy = resolve(recipe), probe_shapes(model, anatomy_of(model, recipe))
    plan = with_widths(plan_from_shapes(model, spec), anatomy, spec, groups_by_shape(anatomy, spec))
    forward = trace(model, anatomy, 4, 64, torch.bfloat16).blocks[0].forward
    found = compressed(Work(model, anatomy, spec, plan, TOKENS, None, "bfloat16"), 0, forward)
    left = sum(site.after for site in plan.sites if site.block == 0)
    assert left < SITES
    assert flops(found, "product") == 2 * 4 * 64 * left


def test_time_grows_with_tokens_as_passes_do_and_solving_does_not(model: transformers.PreTrainedModel) -> None:
    twice = Tokens(2 * TOKENS.windows, TOKENS.length, TOKENS.batch)
    once, _ = stages(model, method="loss-optimal", keep=0.8)
    more, _ = stages(model, twice, method="loss-optimal", keep=0.8)
    for stage in ("backward", "capture"):
        assert _all(more[stage]) == pytest.approx(2 * _all(once[stage]), rel=0.01), stage
    assert _all(more["solve"]) == _all(once["solve"])


def test_passes_behind_compressed_blocks_run_every_block_twice(model: transformers.PreTrainedModel) -> None:
    forward = BLOCKS * TOKENS.windows * TOKENS.length * 2 * SITES
    assert flops(stages(model, method="svd-llm", keep=0.8)[0]["walk"], "product") == forward
    pruned = flops(stages(model, method="wanda", sparsity=0.5)[0]["walk"], "product")
    left_early = BLOCKS * TOKENS.windows * TOKENS.length * 2 * WIDTH * INNER  # the last layer of a block reads last
    assert pruned == 2 * forward - left_early


def test_a_quarter_of_the_windows_goes_back_where_a_method_needs_no_more(model: transformers.PreTrainedModel) -> None:
    full, _ = stages(model, method="loss-optimal", keep=0.8)
    diagonal, _ = stages(model, method="loss-optimal", keep=0.8, options={"output_weighting": "diagonal"})
    products = [flops(found["backward"], "product") for found in (diagonal, full)]
    assert products[0] == pytest.approx(products[1] / 4)
    assert "walk" not in full  # its Grams are collected on the way back
    assert "walk" in diagonal


def test_every_draw_of_labels_adds_to_the_grams_of_gradients_alone(model: transformers.PreTrainedModel) -> None:
    def updated(draws: int) -> float:
        found = Passes(work_of(model, keep=0.8, options={"labels_per_token": draws}))
        return flops(found.backward(found._spec.passes()[0]), "gram")

    assert updated(3) - updated(2) == pytest.approx(updated(2) - updated(1)) != 0
    assert updated(2) - updated(1) < updated(1)


def test_what_needs_no_data_runs_nothing(model: transformers.PreTrainedModel) -> None:
    found, unknown = stages(model, method="svd", keep=0.8)
    assert not unknown
    assert {"walk", "backward", "capture"}.isdisjoint(found)
    assert _all(found["solve"])


def test_a_method_that_declares_no_operations_is_not_predicted(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = dataclasses.replace(METHODS["svd-llm"], operations=None)  # type: ignore[type-var]
    monkeypatch.setitem(METHODS._builtin, "svd-llm", silent)
    found, unknown = stages(model, method="svd-llm", keep=0.8)
    assert unknown == ["solve (method svd-llm does not declare its operations)"]
    assert _all(found["walk"])


def _all(operations: list[Operation]) -> float:
    return sum((one.flops + one.bytes) * one.times for one in operations)


SIZES = {"product": (8, 8, 8), "attention": (1, 2, 8, 4), "attention back": (1, 2, 8, 4), "triangular": (8, 3),
         "solve": (8, 3), "channels": (8, 24, 6), "pivot": (4, 8, 8), "gram": (16, 8), "cross": (16, 8),
         "energy": (16, 8), "fisher": (2, 4, 8, 8), "select": (4, 8), "pack": (8, 8), "sweep": (8, 8, 4)}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"call"}))
def test_every_kind_of_operation_can_be_measured(kind: str) -> None:
    dtype = "bytes" if kind in ("read", "write") else "float32" if kind in ("select",) else "float64"
    operation = Operation(kind, SIZES.get(kind, (64,)), dtype)
    prepared(operation, CPU)()
    assert operation.flops + operation.bytes > 0
    assert kind in LIMITS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that goes by a second whenever somebody looks."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(measured, "prepared", lambda *_: lambda: None)
    return lambda: float(next(ticks))


def test_what_was_measured_is_kept_for_a_week_of_the_same_machine(
    tmp_path: Path, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Measured(clock=clock, folder=tmp_path)
    assert first.seconds(product(8, 8, 8)) == 1
    first.keep()

    def kept() -> bool:
        return bool(Measured(clock=clock, folder=tmp_path)._known)

    assert kept()
    told = json.loads((tmp_path / "cost.json").read_text())
    (tmp_path / "cost.json").write_text(json.dumps({**told, "since": told["since"] - WEEK}))
    assert not kept()
    (tmp_path / "cost.json").write_text(json.dumps({**told, "of": {**told["of"], "threads": "77"}}))
    assert not kept()
    for damaged in ("{", "[]", json.dumps({**told, "seconds": {"x": -1}})):
        (tmp_path / "cost.json").write_text(damaged)
        assert not kept()


def test_what_is_too_large_to_measure_is_extended_from_two_sizes(clock: Callable[[], float], tmp_path: Path) -> None:
    here = Measured(clock=clock, folder=tmp_path)
    large = product(2**15, 2**15, 2**15)
    # The clock gives every size the same second: time would not grow, which is taken for noise.
    assert here.seconds(large) == pytest.approx((large.flops / 2**33) ** measured.LEAST, rel=0.5)
    assert here.seconds(Operation("product", (8, 8, 8), times=5)) == 5


def test_a_published_machine_takes_the_slower_of_arithmetic_and_memory() -> None:
    large = product(8192, 8192, 8192, "bfloat16")
    assert H100.seconds(large) == pytest.approx(large.flops / (989e12 * H100.default))
    moved = Operation("stream", (10**9,), "bfloat16", times=3)
    assert H100.seconds(moved) == pytest.approx(3 * 2e9 / (3.35e12 * H100.streamed))
    assert H100.computed


class Slowed:
    """Rates by which everything takes a second a gigaflop, and two things at once take longer."""

    machine, computed = "no machine", True

    def __init__(self, slowdown: float | None) -> None:
        self._slowdown = slowdown

    def seconds(self, operation: Operation) -> float:
        return operation.flops * operation.times / 1e9

    def slowdown(self) -> float | None:
        return self._slowdown

    def compute_dtype(self, asked: str, model_dtype: str) -> str:
        raise NotImplementedError


@pytest.mark.parametrize(("runs", "solves"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 0.0)])
def test_what_is_done_at_once_takes_from_the_longer_to_the_sum_of_both(runs: float, solves: float) -> None:
    assert sum(beside(runs, solves, 1.0)) == max(runs, solves)
    assert sum(beside(runs, solves, 2.0)) == runs + solves
    running, waiting = beside(runs, solves, 1.5)
    assert running >= runs
    assert waiting >= 0
    assert running + waiting == (max(runs, solves) + runs + solves) / 2


def test_blocks_in_memory_are_solved_beside_the_next_ones_run_where_two_things_can_be_done_at_once(
    model: transformers.PreTrainedModel,
) -> None:
    work = work_of(model, method="svd-llm", keep=0.8)
    in_turn, _ = seconds_of(work, Slowed(None))
    streamed, _ = seconds_of(dataclasses.replace(work, resident=False), Slowed(1.0))
    at_once, _ = seconds_of(work, Slowed(1.0))
    assert in_turn == streamed
    runs, solves = in_turn["walk"], in_turn["solve"]
    assert at_once["walk"] + at_once["solve"] == pytest.approx(max(runs, solves))
    assert {**at_once, "walk": runs, "solve": solves} == in_turn


def test_behind_compressed_blocks_nothing_is_done_at_once(model: transformers.PreTrainedModel) -> None:
    work = work_of(model, method="wanda", sparsity=0.5)
    assert seconds_of(work, Slowed(1.0)) == seconds_of(work, Slowed(None))


def test_two_threads_take_as_much_processor_time_at_once_as_in_turn(clock: Callable[[], float]) -> None:
    assert Measured(clock=clock, fresh=True).slowdown() is None
    assert H100.slowdown() is None


def test_how_much_slower_two_things_are_at_once_is_measured_where_there_are_two_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "AT_ONCE", (product(64, 64, 64), Operation("eigh", (32,))))
    monkeypatch.setattr(measured, "LONG_ENOUGH", 0.05)
    monkeypatch.setattr(measured, "processors", lambda: 1)
    assert Measured(folder=tmp_path).slowdown() is None
    monkeypatch.setattr(measured, "processors", lambda: 2)
    here = Measured(folder=tmp_path)
    found = here.slowdown()
    assert found is not None
    assert 1 <= found <= 2
    here.keep()
    assert Measured(folder=tmp_path).slowdown() == found
