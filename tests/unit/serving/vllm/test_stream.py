"""What an engine gets of a folder's tensors."""

import pytest
import torch

from pared.modules import NMGroups, SparseLinear
from pared.serving.vllm.layout import UnsupportedError
from pared.serving.vllm.stream import expected, for_engine


def _sparse(groups: NMGroups | None) -> tuple[SparseLinear, torch.Tensor, dict[str, torch.Tensor]]:
    W_ON = torch.randn(6, 8)
    mask_ON = torch.zeros(6, 8, dtype=torch.bool)
    mask_ON[:, ::2] = True
    layer = SparseLinear.of(W_ON * mask_ON, mask_ON, None, groups)
    return layer, layer.weight.detach(), layer.state_dict()


@pytest.mark.parametrize("groups", [None, NMGroups(2, 4)], ids=["unstructured", "2:4"])
def test_a_sparse_weight_arrives_dense_and_bit_for_bit(groups: NMGroups | None) -> None:
    layer, W_ON, state = _sparse(groups)
    tensors = {f"m.{name}": tensor for name, tensor in state.items()}
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        modules = {"m": {"kind": "sparse", **layer.entry()}}
        read = dict(for_engine([(name, tensors[name]) for name in order], modules, {}))
        assert list(read) == ["m.weight"]
        assert torch.equal(read["m.weight"], W_ON)
        assert read["m.weight"].is_contiguous()


def test_a_shared_basis_arrives_for_every_module_that_has_it() -> None:
    entry = {"kind": "low_rank", "in_features": 4, "out_features": 4, "rank": 2, "bias": False}
    modules = {"a": entry, "b": entry}
    shared = {"b.down.weight": "a.down.weight"}
    assert expected(modules, shared) == {"a.down.weight", "a.up.weight", "b.up.weight"}
    tensors = {name: torch.randn(2, 2) for name in expected(modules, shared)}
    read = dict(for_engine(sorted(tensors.items()), modules, shared))
    assert torch.equal(read["b.down.weight"], read["a.down.weight"])
    assert read["b.down.weight"] is not read["a.down.weight"]  # vLLM sets the shard as an attribute


def test_the_bias_of_factors_arrives_as_the_layers_own_and_other_tensors_as_they_are() -> None:
    modules = {"a": {"kind": "pivoted", "in_features": 4, "out_features": 4, "rank": 4, "bias": True}}
    tensors = [("a.up.weight", torch.ones(4, 4)), ("a.up.bias", torch.ones(4)), ("a.order", torch.arange(4)),
               ("other.up.bias", torch.ones(1)), ("values", torch.ones(1))]  # fmt: skip
    assert [name for name, _ in for_engine(tensors, modules, {})] == [
        "a.up.weight", "a.bias", "a.order", "other.up.bias", "values"
    ]  # fmt: skip


def test_a_tensor_that_the_map_names_and_no_file_has_is_refused_by_name() -> None:
    modules = {"a": {"kind": "low_rank", "in_features": 4, "out_features": 4, "rank": 2, "bias": False}}
    with pytest.raises(UnsupportedError, match=r"1 tensors that the map names.*a\.up\.weight"):
        list(for_engine([("a.down.weight", torch.ones(2, 4))], modules, {}))


def test_bits_that_do_not_fit_the_values_are_refused_by_name() -> None:
    layer, _, state = _sparse(None)
    tensors = [("m.values", state["values"][:-1]), ("m.bits", state["bits"])]
    with pytest.raises(UnsupportedError, match=r"m: .*values.*damaged"):
        list(for_engine(tensors, {"m": {"kind": "sparse", **layer.entry()}}, {}))


def test_what_stops_a_load_without_pared_is_no_weight_of_the_engine() -> None:
    modules = {"a": {"kind": "low_rank", "in_features": 4, "out_features": 4, "rank": 1, "bias": False}}
    factors = [("a.down.weight", torch.ones(1, 4)), ("a.up.weight", torch.ones(4, 1))]
    empty = [("a.weight", torch.empty(0)), ("import_pared_or_trust_remote_code", torch.empty(0))]
    assert list(for_engine([*empty, *factors], modules, {})) == factors
