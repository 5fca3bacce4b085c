"""A sparse weight comes back bit for bit from as few bytes as promised, and never from bytes that are not its own."""

import math

import pytest
import torch

from pared.modules import packing as module
from pared.modules.packing import Packed, pack, pack_mask, pack_nm, packed_bytes, unpack, unpack_mask, unpack_nm
from pared.schema import plan
from pared.sparsity import NM, Unstructured, magnitude

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
GROUPS = pytest.mark.parametrize(
    "pattern",
    [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 5), NM(1, 1), NM(2, 2), NM(7, 10), NM(3, 256), NM(129, 130)],
    ids=str,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))


def stored_bytes(packed: Packed) -> int:
    return sum(part.numel() * part.element_size() for part in packed)


def with_odd_values(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> torch.Tensor:
    """Kept: -0.0, 0.0, infinities, NaN and the smallest and largest numbers of the dtype."""
    numbers = torch.finfo(W_ON.dtype)
    odd = [-0.0, 0.0, math.inf, -math.inf, math.nan, numbers.smallest_normal / 4, numbers.max]
    W_ON, where = W_ON.clone(), mask_ON.nonzero()[: len(odd)].unbind(dim=1)
    W_ON[where] = torch.tensor(odd, dtype=torch.float64)[: len(where[0])].to(W_ON.dtype)
    return W_ON


# Masks.


def test_bits_fill_bytes_from_the_lowest_and_the_last_with_zeros():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0b00001101, 0b00000011]
    assert torch.equal(unpack_mask(packed, (2, 5)), mask)
    assert pack_mask(torch.tensor([False] * 7 + [True])).tolist() == [128]


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 7), (16, 16), (2, 3, 5), (0, 8), (5, 0)])
def test_masks_of_any_shape_come_back(shape: tuple[int, ...]):
    mask = draw(*shape) > 0
    packed = pack_mask(mask)
    assert packed.shape == (math.ceil(math.prod(shape) / 8),)
    assert torch.equal(unpack_mask(packed, shape), mask)
    assert torch.equal(unpack_mask(pack_mask(~mask), shape), ~mask)


def test_a_mask_that_lies_across_memory_is_packed_in_its_own_order():
    mask = draw(9, 5) > 0
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.clone()))
    assert torch.equal(unpack_mask(pack_mask(mask.T), (5, 9)), mask.T)


@pytest.mark.parametrize("length", [0, 1, 3, 5, 9])
def test_bits_that_are_too_few_or_too_many_are_refused(length: int):
    with pytest.raises(ValueError, match=r"of a mask \(4, 7\): expected uint8 \(4,\)"):
        unpack_mask(torch.zeros(length, dtype=torch.uint8), (4, 7))


def test_bits_of_another_kind_are_refused():
    for bits in (torch.zeros(4), torch.zeros(4, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \(4,\)"):
            unpack_mask(bits, (4, 7))
    with pytest.raises(ValueError, match="expected sizes of 0 and more"):
        unpack_mask(torch.zeros(4, dtype=torch.uint8), (-4, -8))
    with pytest.raises(ValueError, match="expected booleans"):
        pack_mask(torch.ones(4))


def test_a_filling_that_is_not_zero_is_refused():
    bits = pack_mask(torch.ones(4, 7, dtype=torch.bool))
    assert unpack_mask(bits, (4, 7)).all()
    bits[-1] |= 128
    with pytest.raises(ValueError, match="bits beyond the 28"):
        unpack_mask(bits, (4, 7))


# Zeros anywhere.


@DTYPES
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(8, 16), (5, 7), (1, 3)])
def test_what_is_kept_comes_back_bit_for_bit(shape: tuple[int, int], sparsity: float, dtype: torch.dtype):
    W_ON, mask_ON = magnitude.prune(draw(*shape).to(dtype), Unstructured(sparsity))
    W_ON = with_odd_values(W_ON, mask_ON)
    packed = pack(W_ON, mask_ON)
    assert packed.values.shape == (int(mask_ON.sum()),)
    assert same_bits(packed.values, W_ON[mask_ON])
    assert same_bits(unpack(*packed, shape), W_ON)


def test_a_worked_example_of_zeros_anywhere():
    W_ON = torch.tensor([[0.0, 5, 0], [7, 0, -0.0]])
    packed = pack(W_ON, torch.tensor([[False, True, False], [True, False, True]]))
    assert packed.values.tolist() == [5, 7, 0]
    assert packed.bits.tolist() == [0b101010]


@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (30, 50)])
def test_half_of_a_bfloat16_weight_takes_nine_sixteenths_of_its_bytes(shape: tuple[int, int]):
    dense = 2 * math.prod(shape)
    pruned = magnitude.prune(draw(*shape).bfloat16(), Unstructured(0.5))
    assert stored_bytes(pack(*pruned)) <= 0.57 * dense
    assert stored_bytes(pack(*pruned)) == math.prod(shape) + math.ceil(math.prod(shape) / 8)
    if shape[1] % 4 == 0:
        pruned = magnitude.prune(draw(*shape).bfloat16(), NM(2, 4))
        assert stored_bytes(pack_nm(*pruned, NM(2, 4))) == 0.5625 * dense


def test_every_flipped_bit_and_every_cut_is_noticed():
    W_ON, mask_ON = magnitude.prune(draw(5, 7), Unstructured(0.4))
    values, bits = pack(W_ON, mask_ON)
    for place in range(8 * len(bits)):
        flipped = bits.clone()
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"values \(21,\) for a mask that keeps|bits beyond the 35"):
            unpack(values, flipped, (5, 7))
    for length in range(len(values)):
        with pytest.raises(ValueError, match=rf"values \({length},\) for a mask that keeps 21"):
            unpack(values[:length], bits, (5, 7))
    for length in range(len(bits)):
        with pytest.raises(ValueError, match="expected uint8"):
            unpack(values, bits[:length], (5, 7))
    with pytest.raises(ValueError, match="for a mask that keeps 21"):
        unpack(torch.cat([values, values[:1]]), bits, (5, 7))
    for wrong in (values[None], values[:, None]):
        with pytest.raises(ValueError, match="for a mask that keeps 21"):
            unpack(wrong, bits, (5, 7))
    for shape in ((5, 9), (4, 7), (3, 8), (0, 0)):
        with pytest.raises(ValueError, match=r"of a mask .*: expected uint8"):
            unpack(values, bits, shape)


def test_weights_outside_of_the_mask_are_not_lost_in_silence():
    mask_ON = torch.zeros(2, 4, dtype=torch.bool)
    for bad in (1e-45, -1.0, math.nan, math.inf):
        W_ON = torch.zeros(2, 4)
        W_ON[1, 2] = bad
        with pytest.raises(ValueError, match="1 weights that are not zero are outside of the mask"):
            pack(W_ON, mask_ON)
        with pytest.raises(ValueError, match="1 weights that are not zero are outside of the mask"):
            pack_nm(W_ON, mask_ON, NM(2, 4))


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(4, 2).bool(), torch.ones(4).bool()])
def test_a_mask_that_is_none_is_refused(mask: torch.Tensor):
    for packing in (lambda: pack(torch.ones(2, 4), mask), lambda: pack_nm(torch.ones(2, 4), mask, NM(4, 4))):
        with pytest.raises(ValueError, match=r"of a weight \(2, 4\): expected booleans and the same"):
            packing()


# N:M.


def test_a_worked_example_of_2_of_4():
    W_ON = torch.tensor([[0.0, 5, 0, 6, 7, 0, 8, 0]])
    packed = pack_nm(W_ON, W_ON != 0, NM(2, 4))
    assert packed.values.tolist() == [[5, 6, 7, 8]]
    assert packed.bits.tolist() == [0b10_00_11_01]  # places 1, 3 | 0, 2, two bits each, the first lowest
    assert torch.equal(unpack_nm(*packed, (1, 8), NM(2, 4)), W_ON)


@GROUPS
@DTYPES
def test_groups_come_back_bit_for_bit(pattern: NM, dtype: torch.dtype):
    shape = (3, 2 * pattern.group)
    W_ON, mask_ON = magnitude.prune(draw(*shape).to(dtype), pattern)
    W_ON = with_odd_values(W_ON, mask_ON)
    packed = pack_nm(W_ON, mask_ON, pattern)
    assert packed.values.shape == (3, 2 * pattern.kept)
    bits = min(pattern.kept * math.ceil(math.log2(pattern.group)), pattern.group)
    assert len(packed.bits) == math.ceil(6 * bits / 8)
    assert same_bits(unpack_nm(*packed, shape, pattern), W_ON)


@GROUPS
def test_groups_that_keep_fewer_are_filled_up_with_zeros(pattern: NM):
    shape = (4, 3 * pattern.group)
    W_ON, mask_ON = magnitude.prune(draw(*shape), pattern)
    fewer_ON = mask_ON & (draw(*shape, seed=1) > 0.3)
    fewer_ON[0] = False  # groups that keep nothing
    W_ON = W_ON * fewer_ON
    packed = pack_nm(W_ON, fewer_ON, pattern)
    assert packed.values.shape == (4, 3 * pattern.kept)
    assert torch.equal(unpack_nm(*packed, shape, pattern), W_ON)


def test_what_fills_up_is_zero_whatever_sign_the_weight_has_there():
    W_ON = torch.tensor([[-0.0, -0.0, 3.0, -0.0]])
    packed = pack_nm(W_ON, torch.tensor([[False, False, True, False]]), NM(2, 4))
    assert same_bits(unpack_nm(*packed, (1, 4), NM(2, 4)), torch.tensor([[0.0, 0, 3, 0]]))


def test_a_weight_that_lies_across_memory_is_packed_in_its_own_order():
    W_ON, mask_ON = magnitude.prune(draw(12, 8).T, NM(2, 4))
    assert torch.equal(unpack_nm(*pack_nm(W_ON, mask_ON, NM(2, 4)), (8, 12), NM(2, 4)), W_ON)
    assert torch.equal(unpack(*pack(W_ON, mask_ON), (8, 12)), W_ON)


def test_the_bits_of_a_nan_stay_as_they_are():
    """They came back as another NaN of bfloat16 once."""
    W_ON = torch.tensor([[0x7FC1, 0, 0x7F81, 0]], dtype=torch.int16).view(torch.bfloat16)
    mask_ON = W_ON.view(torch.int16) != 0
    assert same_bits(unpack(*pack(W_ON, mask_ON), (1, 4)), W_ON)
    assert same_bits(unpack_nm(*pack_nm(W_ON, mask_ON, NM(2, 4)), (1, 4), NM(2, 4)), W_ON)


def test_groups_that_keep_more_are_refused():
    W_ON = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="keeps more than the 2 of pattern 2:4"):
        pack_nm(W_ON, W_ON != 0, NM(2, 4))


def test_groups_too_large_or_not_filled_are_refused():
    for shape, pattern, told in (((1, 257), NM(1, 257), "at most 256"), ((1, 6), NM(2, 4), "a multiple of 4")):
        W_ON = torch.zeros(shape)
        with pytest.raises(ValueError, match=told):
            pack_nm(W_ON, W_ON != 0, pattern)
        with pytest.raises(ValueError, match=told):
            unpack_nm(W_ON, torch.zeros(1, dtype=torch.uint8), shape, pattern)


def test_every_cut_of_groups_is_noticed():
    pattern, shape = NM(3, 5), (4, 10)
    values, bits = pack_nm(*magnitude.prune(draw(*shape), pattern), pattern)
    for length in range(len(bits)):
        with pytest.raises(ValueError, match="expected uint8"):
            unpack_nm(values, bits[:length], shape, pattern)
    for wrong in (values[:3], values[:, :5], values.flatten(), values.T, torch.cat([values, values])):
        with pytest.raises(ValueError, match=r"of a weight \(4, 10\) with pattern 3:5: expected \(4, 6\)"):
            unpack_nm(wrong, bits, shape, pattern)
    for other in (NM(3, 10), NM(1, 5), NM(1, 2)):
        with pytest.raises(ValueError, match=f"with pattern {other}: expected"):
            unpack_nm(values, bits, shape, other)


@pytest.mark.parametrize("places", [(1, 1), (3, 1), (0, 0), (4, 6), (0, 7)])
def test_places_that_repeat_fall_or_leave_the_group_are_refused(places: tuple[int, int]):
    bits = torch.tensor([places[0] | places[1] << 3], dtype=torch.uint8)
    with pytest.raises(ValueError, match="are not rising"):
        unpack_nm(torch.ones(1, 2), bits, (1, 6), NM(2, 6))
    good = torch.tensor([1 | 5 << 3], dtype=torch.uint8)
    assert unpack_nm(torch.ones(1, 2), good, (1, 6), NM(2, 6)).tolist() == [[0, 1, 0, 0, 0, 1]]


def test_a_worked_example_of_4_of_8_has_a_mask():
    W_ON = torch.tensor([[0.0, 5, 0, 6, 7, 0, 8, 0], [0, 0, 0, 0, 0, 0, 0, 9]])
    packed = pack_nm(W_ON, W_ON != 0, NM(4, 8))
    assert packed.values.tolist() == [[5, 6, 7, 8], [0, 0, 0, 9]]
    assert packed.bits.tolist() == [0b01011010, 0b10000111]  # what fills up comes first
    assert torch.equal(unpack_nm(*packed, (2, 8), NM(4, 8)), W_ON)


@pytest.mark.parametrize("bits", [0b0111, 0b11111, 0, 0b11111111])
def test_masks_of_another_number_are_refused(bits: int):
    with pytest.raises(ValueError, match=r"another number of bits than 4.*pattern 4:8"):
        unpack_nm(torch.ones(1, 4), torch.tensor([bits], dtype=torch.uint8), (1, 8), NM(4, 8))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(8, 16), NM(1, 2)], ids=str)
def test_half_of_a_bfloat16_weight_takes_at_most_nine_sixteenths_in_any_pattern(pattern: NM):
    W_ON, mask_ON = magnitude.prune(draw(64, 96).bfloat16(), pattern)
    assert stored_bytes(pack_nm(W_ON, mask_ON, pattern)) <= 0.5625 * W_ON.nbytes


@GROUPS
def test_a_plan_counts_the_bytes_of_the_bits(pattern: NM):
    shape = (3, 2 * pattern.group)
    packed = pack_nm(*magnitude.prune(draw(*shape), pattern), pattern)
    assert plan.NM(kept=pattern.kept, group=pattern.group).index_bytes(*shape) == len(packed.bits)
    assert packed_bytes(shape, pattern) == len(packed.bits)


def test_foreign_bytes_give_an_error_or_a_weight_of_the_pattern():
    read = 0
    for seed in range(300):
        values = draw(1, 4, seed=seed)
        try:
            W_ON = unpack_nm(values, random_bytes(1, seed), (1, 8), NM(2, 4))
        except ValueError:
            continue
        read += 1
        assert torch.equal(W_ON[W_ON != 0], values.flatten())
        assert (W_ON != 0).view(2, 4).sum(dim=1).tolist() == [2, 2]
    assert 10 < read < 100  # (6 / 16)² of them are bits of a weight


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)])
def test_a_weight_without_weights_is_packed_too(shape: tuple[int, int]):
    W_ON = torch.zeros(shape)
    assert unpack(*pack(W_ON, W_ON != 0), shape).shape == shape
    assert unpack_nm(*pack_nm(W_ON, W_ON != 0, NM(2, 4)), shape, NM(2, 4)).shape == shape


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 33), (0, 4)])
def test_numpy_and_torch_write_the_same_bits(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    expected = (padded << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
    assert torch.equal(pack_mask(mask), expected)


def test_a_weight_that_requires_grad_and_is_not_contiguous_is_packed() -> None:
    weight = torch.nn.Parameter(torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, 5.0]], dtype=torch.bfloat16))
    packed = pack(weight.T, weight.T != 0)
    assert packed.values.tolist() == [3.0, -1.0, 2.0, 5.0]
    assert not packed.values.requires_grad


@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (33, 41)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_weight_is_unpacked_in_parts_to_the_same_bits(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    mask_ON = torch.rand(shape, generator=random) < 0.5
    W_ON = torch.randn(shape, generator=random).to(dtype) * mask_ON
    packed = pack(W_ON, mask_ON)
    whole = unpack(*packed, shape)
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "CHUNK", 24)
    as_integers = module.AS_INTEGERS[dtype.itemsize]
    assert torch.equal(unpack(*packed, shape).view(as_integers), whole.view(as_integers))
    assert torch.equal(whole, W_ON)
    for values in (packed.values[:-1], torch.cat([packed.values, packed.values[:1]])):
        with pytest.raises(ValueError, match=rf"values \({len(values)},\) for a mask that keeps {mask_ON.sum()}"):
            unpack(values, packed.bits, shape)


@pytest.mark.parametrize("count", [1, 37, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacked_weights_begin_where_tensors_of_torch_do(count: int, dtype: torch.dtype) -> None:
    """Regression: a weight that was unpacked began elsewhere than one that was loaded, and products differed."""
    W_ON = torch.ones(3, count, dtype=dtype)
    packed = [unpack(*pack(W_ON, W_ON != 0), (3, count)) for _ in range(8)]
    assert {one.data_ptr() % 64 for one in packed} == {0}
    assert all(torch.equal(one, W_ON) for one in packed)
