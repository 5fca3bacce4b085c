"""A layer of an engine, on one rank and on many, computes what the modules of the checkpoint compute."""

import pytest
import torch
from engine_layers import Entry, checkpoint, engine, factors, multiply

from pared.serving.vllm.layer import Matrix, MemberLayer
from pared.serving.vllm.layout import UnsupportedError, members_of
from pared.serving.vllm.narrowing import Shape, arrange

MIXED = {"q_proj": factors(8, 6, 3), "k_proj": factors(4, 6, 2, "pivoted")}
QKV = {"q_proj": (8, 6), "k_proj": (4, 6), "v_proj": (4, 6)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_ranks_of_a_column_parallel_layer_compute_their_rows_of_every_module(ranks: int, bias: bool) -> None:
    modules = {name: {**entry, "bias": bias} for name, entry in MIXED.items()}
    made, x_BN = checkpoint(modules, QKV, bias), torch.randn(5, 6)
    shapes = [Shape("column", 6, (8, 4, 4), ranks, rank) for rank in range(ranks)]
    outputs = [engine("qkv_proj", modules, made, shape, bias)(x_BN, multiply, bias) for shape in shapes]
    for place, name in enumerate(QKV):
        start, rows = sum((8, 4, 4)[:place]) // ranks, (8, 4, 4)[place] // ranks
        together = torch.cat([one[:, start : start + rows] for one in outputs], 1)
        torch.testing.assert_close(together, made[name](x_BN))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ["low_rank", "pivoted"])
@pytest.mark.parametrize("rank_of_weight", [1, 4, 6])
def test_ranks_of_a_row_parallel_layer_add_up(ranks: int, kind: str, rank_of_weight: int) -> None:
    modules = {"o_proj": factors(8, 6, rank_of_weight, kind, bias=True)}
    made, x_BN = checkpoint(modules, {"o_proj": (8, 6)}, True), torch.randn(5, 6)
    total = torch.zeros(5, 8)
    for rank in range(ranks):
        layer = engine("o_proj", modules, made, Shape("row", 6, (8,), ranks, rank), True)
        part = x_BN[:, rank * 6 // ranks : (rank + 1) * 6 // ranks]
        total += layer(part, multiply, rank == 0)
    torch.testing.assert_close(total, made["o_proj"](x_BN))


def test_a_replicated_layer_is_whole_on_every_rank() -> None:
    modules = {"o_proj": factors(8, 6, 2)}
    made, x_BN = checkpoint(modules, {"o_proj": (8, 6)}, False), torch.randn(5, 6)
    layer = engine("o_proj", modules, made, Shape("replicated", 6, (8,), 2, 1))
    torch.testing.assert_close(layer(x_BN, multiply, False), made["o_proj"](x_BN))


def test_a_shared_basis_is_one_matrix_and_multiplied_by_once() -> None:
    modules = {name: factors(4, 6, 3) for name in ("q_proj", "k_proj", "v_proj")}
    made = checkpoint(modules, dict.fromkeys(modules, (4, 6)), False)
    for name in ("k_proj", "v_proj"):
        made[name].down.weight = made["q_proj"].down.weight
    shared = {f"{name}.down.weight": "q_proj.down.weight" for name in ("k_proj", "v_proj")}
    layer = engine("qkv_proj", modules, made, Shape("column", 6, (4, 4, 4)), shared=shared)
    used: list[Matrix] = []

    def counted(matrix: Matrix, x: torch.Tensor, bias: bool) -> torch.Tensor:
        used.append(matrix)
        return multiply(matrix, x, bias)

    x_BN = torch.randn(5, 6)
    torch.testing.assert_close(layer(x_BN, counted, False), torch.cat([made[name](x_BN) for name in modules], 1))
    assert len(used) == 4
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * 6 + 3 * 4 * 3


def test_a_model_that_transposes_what_it_reads_gets_the_same_layer() -> None:
    modules = {"c_proj": factors(6, 6, 3, "pivoted")}  # every factor of it is square or could be mistaken
    made, x_BN = checkpoint(modules, {"c_proj": (6, 6)}, False), torch.randn(5, 6)
    turned = engine("c_proj", modules, made, Shape("row", 6, (6,)), change=lambda t: t.t() if t.ndim == 2 else t)
    torch.testing.assert_close(turned(x_BN, multiply, False), made["c_proj"](x_BN))


def _member(entry: Entry, shape: Shape) -> MemberLayer:
    members = members_of("o_proj", 1, {}, {"o_proj": entry}, {})
    return MemberLayer(members[0], arrange("o_proj", members, shape, {}), False, torch.float32, {})


def test_a_tensor_that_never_arrived_is_refused_by_name() -> None:
    layer = _member(factors(8, 6, 2), Shape("row", 6, (8,)))
    layer.load("up.weight", torch.zeros(8, 2))
    with pytest.raises(UnsupportedError, match=r"o_proj: down\.weight was not read; its values would be random"):
        layer.finish(lambda _: None)


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    layer = _member(factors(8, 6, 2), Shape("row", 6, (8,)))
    with pytest.raises(UnsupportedError, match=r"o_proj: up\.weight \(8, 3\) was read, expected \(8, 2\)"):
        layer.load("up.weight", torch.zeros(8, 3))
    with pytest.raises(UnsupportedError, match=r"o_proj: values \(3,\) was read, expected none"):
        layer.load("values", torch.zeros(3))


def test_an_order_that_is_no_permutation_is_refused() -> None:
    layer = _member(factors(8, 6, 2, "pivoted"), Shape("row", 6, (8,)))
    with pytest.raises(UnsupportedError, match="order is not a permutation"):
        layer.load("order", torch.zeros(6, dtype=torch.int32))


def test_a_module_of_another_shape_than_the_layer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"o_proj: 8 x 6 in the map, 8 x 12 in the engine's layer"):
        _member(factors(8, 6, 2), Shape("row", 12, (8,)))


def test_a_kind_of_another_package_is_refused() -> None:
    entry = {"kind": "somebodys:kind", "in_features": 6, "out_features": 8, "bias": False}
    with pytest.raises(UnsupportedError, match=r"o_proj: kind 'somebodys:kind' cannot be served.*--to dense"):
        _member(entry, Shape("row", 6, (8,)))


@pytest.mark.slow
def test_a_layer_is_one_graph_for_a_compiler() -> None:
    made, x_BN = checkpoint(MIXED, QKV, False), torch.randn(5, 6)
    layer = engine("qkv_proj", MIXED, made, Shape("column", 6, (8, 4, 4)))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BN, multiply, False), layer(x_BN, multiply, False))
