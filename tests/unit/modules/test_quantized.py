"""Layers in few bits: what is stored comes back, is what is computed with, and is refused where it is damaged."""

import pytest
import torch
from torch.nn import functional

from pared.modules import LowRankLinear, PivotedLinear, QuantizedLinear, SparseLinear, bits_of
from pared.modules.quantized import pack_int4, unpack_int4
from pared.schema.bits import LAYOUTS, stored_bytes
from pared.training.trainable import unpack

FORMS = pytest.mark.parametrize("form", sorted(LAYOUTS))
SHAPES = pytest.mark.parametrize("shape", [(3, 64), (5, 7), (2, 130), (4, 1)], ids=str)


def layer(form: str, shape: tuple[int, int], bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    bits, group = LAYOUTS[form]
    source = torch.Generator().manual_seed(0)
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    integers = torch.randint(low, high, shape, generator=source, dtype=torch.int8)
    groups = -(-shape[1] // group) if group else 1
    scales = torch.randn(shape[0], groups, generator=source).to(dtype)
    return QuantizedLinear.of(integers, scales, torch.randn(shape[0]).to(dtype) if bias else None, bits, group)


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_integers_in_range_round_trip_exactly(width: int) -> None:
    every = torch.arange(-8, 8, dtype=torch.int8).repeat(width).view(-1, width)
    assert torch.equal(unpack_int4(pack_int4(every), width), every)
    assert pack_int4(every).shape == (16, -(-width // 2))


@pytest.mark.parametrize("number", [-9, 8])
def test_a_number_that_is_no_int4_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="expected -8 to 7"):
        pack_int4(torch.tensor([[0, number]], dtype=torch.int8))


@FORMS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_every_whole_number_times_the_scale_of_its_group(
    form: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    made = layer(form, shape, dtype=dtype)
    width = LAYOUTS[form].group or shape[1]
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected = made.integers[row, column].to(dtype) * made.scales[row, column // width]
            assert made.weight[row, column] == expected
    assert made.weight.dtype == dtype


@FORMS
def test_it_computes_with_that_weight(form: str) -> None:
    made, x = layer(form, (6, 130)), torch.randn(2, 3, 130)
    assert torch.equal(made(x), functional.linear(x, made.weight, made.bias))


@FORMS
@SHAPES
def test_the_state_is_as_many_bytes_as_a_plan_says(form: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        state = layer(form, shape, bias=False, dtype=dtype).state_dict()
        assert sum(one.nbytes for one in state.values()) == stored_bytes(form, *shape, dtype.itemsize)
    assert stored_bytes(None, *shape, 2) == 2 * shape[0] * shape[1]


@FORMS
def test_an_entry_makes_the_layer_again(form: str) -> None:
    made = layer(form, (3, 70))
    again = QuantizedLinear(**made.entry())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.weight, made.weight)
    assert again.entry() == made.entry()


def test_casting_a_model_leaves_whole_numbers_alone() -> None:
    made = layer("int8", (3, 16))
    before = made.codes.clone()
    made.half()
    assert made.codes.dtype == torch.int8
    assert torch.equal(made.codes, before)
    assert made.weight.dtype == torch.float16


def test_factors_in_few_bits_say_so_in_their_entry() -> None:
    made = LowRankLinear(70, 12, 9, True, bits=4, group=64)
    assert made.entry()["bits"] == 4
    assert LowRankLinear(**made.entry()).state_dict().keys() == made.state_dict().keys()
    assert "bits" not in LowRankLinear(70, 12, 9, True).entry()


def damaged_int8(made: QuantizedLinear) -> None:
    made.codes[0, 0] = -128


def damaged_scale(made: QuantizedLinear) -> None:
    made.scales.data[0, 0] = torch.inf


@pytest.mark.parametrize("damage", [damaged_int8, damaged_scale])
def test_damage_is_refused(damage) -> None:  # type: ignore[no-untyped-def]
    made = layer("int8", (3, 7))
    damage(made)
    with pytest.raises(ValueError, match="damaged"):
        made.check()


def test_bits_behind_the_last_weight_of_an_output_are_refused() -> None:
    made = layer("int4", (3, 7))
    made.check()
    made.codes[1, -1] |= 16
    with pytest.raises(ValueError, match="bits behind the 7 weights"):
        made.check()


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        QuantizedLinear(8, 8, False, 3)


def test_the_bits_of_a_layer_are_its_own_or_those_of_its_factors() -> None:
    assert bits_of(layer("int8", (5, 7))) == 8
    assert bits_of(LowRankLinear(64, 8, 4, bias=False, bits=4, group=64)) == 4
    assert [bits_of(kind(8, 6, 2, bias=False)) for kind in (LowRankLinear, PivotedLinear)] == [0, 0]


def test_a_sparse_layer_was_taken_for_one_of_few_bits() -> None:
    """Regression: what it calls ``bits`` are those of its mask, and training and conversion of it ended in them."""
    weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    sparse = SparseLinear.of(weight, weight != 0, None)
    assert bits_of(sparse) == 0
    model = torch.nn.Sequential(sparse)
    unpack(model)
    assert torch.equal(model[0].weight, weight)
