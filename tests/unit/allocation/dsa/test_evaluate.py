"""Programs: their grammar, what they make of blocks, why they are rejected, and what varies them."""

import dataclasses
import math
import random

import pytest
import torch

from pared.allocation.dsa import (
    EVERYTHING,
    PACKAGED,
    POST,
    PRE,
    REDUCE,
    RELEASED,
    Program,
    ScoreHistogram,
    allocation_key,
    crossover,
    evaluate_program,
    importance,
    mutate,
    packaged_of,
    parse,
    random_program,
    sparsities,
    validation_errors,
)
from pared.errors import ParedError

README = "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"


def blocks(count: int = 6, n: int = 4000, seed: int = 0) -> list[torch.Tensor]:
    """Scores of blocks whose logarithms vary more and more."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.exp((0.2 + 0.15 * i) * torch.randn(n, generator=generator)) for i in range(count)]


@pytest.mark.parametrize(
    "text",
    [
        README,
        "W:()-(MEAN)-()-(8)",
        "W:(NO_OP)-(STD)-(NO_OP)-(1)",
        "W:(PAPER_ABSLOG,POW)-(PAPER_ENTROPY)-(SOFTPLUS,COS)-(50)-(KEEP)",
        *(str(packaged.program) for packaged in PACKAGED.values()),
    ],
)
def test_the_text_of_a_program_is_read_and_written_as_it_was(text: str):
    assert str(parse(text)) == text


def test_every_program_is_read_back_from_its_text():
    generator = random.Random(0)
    for _ in range(500):
        program = random_program(generator)
        program = dataclasses.replace(program, spread=generator.randint(1, 50))
        assert parse(str(program)) == program


def test_white_space_and_case_do_not_matter_and_the_last_slots_may_be_left_out():
    program = Program(("ABSLOG",), "VAR", ("ATAN", "ASIN"), 7, "prune")
    assert parse(README) == program
    assert parse(" w : ( abslog ) - (Var)\n-( ATAN , ASIN )-( 7 ) - (prune) ") == program
    assert parse("W:(ABSLOG)-(VAR)-(ATAN,ASIN)") == dataclasses.replace(program, spread=8)
    assert parse("W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)-(KEEP)").sign == "keep"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(ABS)-(MEAN)-(EXP)-(7)", "begins with 'W:'"),
        ("A:(ABS)-(MEAN)-(EXP)-(7)", "begins with 'W:'"),
        ("W:(ABS)-(MEAN)", "three to five slots"),
        ("W:(ABS)(MEAN)(EXP)", "three to five slots"),
        ("W:(ABS)-(MEAN)-(EXP)-(7)-(KEEP)-(1)", "three to five slots"),
        ("W:((ABS))-(MEAN)-(EXP)", "three to five slots"),
        ("W:(ABSLOGG)-(MEAN)-(EXP)-(7)", "unknown operator 'ABSLOGG' in slot 'pre'; did you mean 'ABSLOG'"),
        (
            "W:(ABS)-(GEOMETRIC)-(EXP)-(7)",
            "unknown operator 'GEOMETRIC' in slot 'reduce'; did you mean 'GEOMETRIC_MEAN'",
        ),
        ("W:(ABS,)-(MEAN)-(EXP)-(7)", "unknown operator '' in slot 'pre'"),
        ("W:(VAR)-(MEAN)-(EXP)-(7)", "'VAR' belongs in slot 'reduce', not in 'pre'"),
        ("W:(ABS)-(TANH)-(EXP)-(7)", "'TANH' belongs in slot 'pre' or 'post', not in 'reduce'"),
        ("W:(ABS)-(NO_OP)-(EXP)-(7)", "'NO_OP' belongs in slot 'pre' or 'post', not in 'reduce'"),
        ("W:(ABS)-(MEAN)-(POW)-(7)", "'POW' belongs in slot 'pre', not in 'post'"),
        ("W:(ABS)-(MEAN)-(EXP)-(9)-(9)", "unknown sign of a program '9'"),
        ("W:(ABS)-(GRAM)-(EXP)-(7)", "'GRAM' needs a matrix; a program reads a vector"),
        ("W:(ABS)-(SLOGDET)-(EXP)-(7)", "'SLOGDET' needs a matrix"),
        ("W:(ABS,ABS,ABS)-(MEAN)-(EXP)-(7)", "'pre' of a program holds up to 2 operators; got ABS, ABS, ABS"),
        ("W:(ABS)-(MEAN,VAR)-(EXP)-(7)", "'reduce' of a program holds one operator; got MEAN, VAR"),
        ("W:(ABS)-(MEAN)-(EXP,SIN,COS)-(7)", "'post' of a program holds up to 2 operators"),
        ("W:(ABS)-()-(EXP)-(7)", "needs one reduction, the slot is empty"),
        ("W:(ABS)-(MEAN)-(EXP)-(0)", "whole number from 1 to 50; got 0"),
        ("W:(ABS)-(MEAN)-(EXP)-(51)", "whole number from 1 to 50; got 51"),
        ("W:(ABS)-(MEAN)-(EXP)-(0.07)", "whole number from 1 to 50; got '0.07'"),
        ("W:(ABS)-(MEAN)-(EXP)-()", "whole number from 1 to 50; got ''"),
        ("W:(ABS)-(MEAN)-(EXP)-(7)-(UP)", "unknown sign of a program 'up'"),
    ],
)
def test_what_is_no_program_is_told_in_one_line(text: str, message: str):
    with pytest.raises(ParedError) as told:
        parse(text)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_an_ill_typed_program_cannot_be_built_in_python_either():
    with pytest.raises(ParedError, match="belongs in slot 'reduce'"):
        Program(("VAR",), "MEAN", ())
    with pytest.raises(ParedError, match="up to 2 operators"):
        Program(("ABS",) * 3, "MEAN", ())
    for spread in (7.5, 7.0, 0, 51):
        with pytest.raises(ParedError, match="whole number from 1 to 50"):
            Program((), "MEAN", (), spread)  # type: ignore[arg-type]


def test_operators_apply_from_left_to_right():
    x = torch.tensor([1.0, 2.0, 3.0])
    y = torch.tensor([2.0, 3.0, 5.0])
    found = importance(parse("W:(POW,EXP)-(MEAN)-(LOG,SQRT)-(8)"), [x, y])
    expected = [math.sqrt(math.log(sum(math.exp(v * v) for v in values) / 3)) for values in ([1, 2, 3], [2, 3, 5])]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.dtype == torch.float64


def test_gaussian_scores_alone_give_abslog_var_its_constant():
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(1)).abs()
    found = importance(parse("W:(ABSLOG)-(VAR)-(NO_OP)-(7)"), [x, 1e-20 * x])
    assert found.tolist() == pytest.approx([math.pi**2 / 8] * 2, rel=1e-2)
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-6)  # no scale


def test_histograms_and_vectors_give_the_same_sparsities():
    parts = blocks(n=50_000)
    histograms = []
    for part in parts:
        histograms.append(ScoreHistogram())
        histograms[-1].update(part)
    program = parse("W:(ABSLOG)-(VAR)-(ATAN)-(7)")
    exact, found = evaluate_program(program, parts, 0.7), evaluate_program(program, histograms, 0.7)
    torch.testing.assert_close(found.sparsities_L, exact.sparsities_L, rtol=0, atol=1e-4)


def test_sparsities_have_the_closed_form():
    i = torch.tensor([3.0, -1.0, 0.5, 2.0])
    a = (i.double() + 1) / 4
    for width in (0.01, 0.07, 0.25):
        prune = sparsities(i, 0.6, width, "prune")
        torch.testing.assert_close(prune, 0.6 + 2 * width * (a - a.mean()), rtol=0, atol=1e-15)
        torch.testing.assert_close(sparsities(i, 0.6, width, "keep"), 1.2 - prune, rtol=0, atol=1e-15)
        assert float(prune.max() - prune.min()) == pytest.approx(2 * width, abs=1e-12)
        assert float(prune.mean()) == pytest.approx(0.6, abs=1e-12)


def test_an_affine_map_of_the_importance_changes_nothing_and_a_negative_one_mirrors():
    i = torch.tensor([0.3, 0.9, 0.1, 0.4], dtype=torch.float64)
    s = sparsities(i, 0.7, 0.08, "prune")
    for a, b in ((2.5, -40.0), (1e-6, 3e-6), (1e20, 0.0)):
        torch.testing.assert_close(sparsities(a * i + b, 0.7, 0.08, "prune"), s, rtol=0, atol=1e-10)
        torch.testing.assert_close(sparsities(-a * i + b, 0.7, 0.08, "keep"), s, rtol=0, atol=1e-10)
        torch.testing.assert_close(sparsities(-a * i + b, 0.7, 0.08, "prune"), 1.4 - s, rtol=0, atol=1e-10)


def test_blocks_in_another_order_have_their_sparsities_in_that_order():
    parts, order = blocks(), [3, 0, 5, 1, 4, 2]
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6])
    program = parse("W:(ABSLOG)-(VAR)-(ATAN)-(30)-(KEEP)")
    s = evaluate_program(program, parts, 0.8, weights).sparsities_L
    permuted = evaluate_program(program, [parts[i] for i in order], 0.8, weights[order]).sparsities_L
    torch.testing.assert_close(permuted, s[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", [0.0, 0.02, 0.5, 0.97, 0.999])
@pytest.mark.parametrize("spread", [7, 50])
def test_a_limit_that_is_reached_never_moves_the_mean(target: float, spread: int):
    program = parse(f"W:(ABSLOG)-(VAR)-(NO_OP)-({spread})")
    weights = torch.tensor([1.0, 10, 1, 3, 1, 7])
    for w in (None, weights):
        verdict = evaluate_program(program, blocks(), target, w)
        s = verdict.sparsities_L
        assert verdict.valid
        mean = s.mean() if w is None else (s * w).sum() / w.sum()
        assert float(mean) == pytest.approx(target, abs=1e-9)
        assert bool(((s >= 0) & (s < 1)).all())
        cut = float(s.max() - s.min()) < 2 * program.width - 1e-9
        assert bool(verdict.notes) == cut
        assert cut == (target != 0.5 or bool(spread == 50))


def test_importance_that_is_constant_or_undefined_is_rejected_with_a_reason():
    same = [torch.arange(1.0, 9.0)] * 3
    verdict = evaluate_program(parse("W:()-(MEAN)-()-(8)"), same, 0.5)
    assert not verdict.valid
    assert verdict.sparsities_L is None
    assert "the same for all 3 blocks, 4.5 to 4.5" in verdict.reasons[0]
    verdict = evaluate_program(parse("W:(EXP)-(MEAN)-()-(8)"), [same[0], 1000 * same[0]], 0.5)
    assert verdict.reasons == ("program W:(EXP)-(MEAN)-()-(8): EXP of block 1 is infinite",)
    with pytest.raises(ParedError, match="the same for all 4 blocks"):
        sparsities(torch.ones(4), 0.5, 0.08, "prune")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_counts_as_constant_has_no_scale(scale: float):
    near = [torch.tensor([scale], dtype=torch.float64), torch.tensor([scale * (1 + 1e-10)], dtype=torch.float64)]
    apart = [torch.tensor([scale], dtype=torch.float64), torch.tensor([scale * (1 + 1e-6)], dtype=torch.float64)]
    program = parse("W:()-(MEAN)-()-(8)")
    assert not evaluate_program(program, near, 0.5).valid
    assert evaluate_program(program, apart, 0.5).sparsities_L.tolist() == pytest.approx([0.42, 0.58])


def test_the_released_codes_values_for_what_is_undefined_are_had_by_asking():
    wide, narrow = torch.exp(4 * torch.randn(4000, generator=torch.Generator().manual_seed(0))), blocks()[0]
    program = parse(README)
    assert "ASIN of block 0 is undefined" in evaluate_program(program, [wide, narrow], 0.7).reasons[0]
    legacy = evaluate_program(program, [wide, narrow], 0.7, legacy_nan_to_zero=True)
    assert float(legacy.importance_L[0]) == 0
    assert legacy.sparsities_L.tolist() == pytest.approx([0.63, 0.77])  # the heavy tail is pruned least
    overflow, fine = torch.tensor([900.0, 900.0]), torch.tensor([1.0, 1.0])
    program = parse("W:()-(MEAN)-(EXP)-(8)")
    assert importance(program, [overflow, fine], legacy_inf_to_minus_one=True).tolist() == pytest.approx([-1, math.e])
    with pytest.raises(ParedError, match="the end of block 0 is infinite"):
        importance(program, [overflow, fine], legacy_nan_to_zero=True)


def test_a_target_or_weights_out_of_range_are_not_the_programs_fault():
    program = parse("W:(ABSLOG)-(VAR)-()-(8)")
    for target in (-0.1, 1.0, math.nan):
        with pytest.raises(ParedError, match="sparsity is the fraction"):
            evaluate_program(program, blocks(), target)
    with pytest.raises(ParedError, match="expected one for each"):
        evaluate_program(program, blocks(), 0.5, torch.ones(5))
    with pytest.raises(ParedError, match="positive numbers"):
        evaluate_program(program, blocks(), 0.5, torch.tensor([1.0, 1, 1, 1, 1, 0]))
    with pytest.raises(ParedError, match="there are no units"):
        evaluate_program(program, [], 0.5)


def test_the_faults_of_an_allocation_are_named():
    assert validation_errors(torch.tensor([0.4, 0.6]), 0.5) == ()
    assert validation_errors(torch.tensor([0.0, 1.0]), 0.5) == (
        "the sparsity of block 1 is 1; expected a number in [0, 1)",
    )
    assert validation_errors(torch.tensor([0.4, 0.7]), 0.5) == ("the mean sparsity is 0.55; expected 0.5",)
    assert validation_errors(torch.tensor([0.4, 0.7]), 0.5, torch.tensor([2.0, 1.0])) == ()
    assert len(validation_errors(torch.tensor([math.nan, 0.5]), 0.5)) == 2


def test_programs_of_one_allocation_have_one_key():
    parts = blocks()

    def key(text: str) -> tuple[int, ...]:
        return allocation_key(evaluate_program(parse(text), parts, 0.7).sparsities_L)

    assert key("W:(ABSLOG)-(VAR)-(NO_OP)-(8)") == key("W:(ABSLOG,NO_OP)-(VAR)-(ABS)-(8)")
    assert key("W:(ABSLOG)-(VAR)-(NO_OP)-(8)") != key("W:(ABSLOG)-(VAR)-(ATAN)-(8)")  # the same ranking
    assert key("W:(ABSLOG)-(VAR)-(NO_OP)-(8)") != key("W:(ABSLOG)-(VAR)-(NO_OP)-(9)")


def test_random_programs_and_their_children_are_grammatical_and_repeatable():
    def walk(seed: int) -> list[Program]:
        generator = random.Random(seed)
        pool = [random_program(generator) for _ in range(20)]
        for _ in range(400):
            a, b = generator.sample(pool[-20:], 2)
            pool.append(mutate(crossover(a, b, generator), generator))
        return pool

    found = walk(0)
    assert all(parse(str(program)) == program for program in found)
    assert all(1 <= len(p.pre) <= 2 and 1 <= len(p.post) <= 2 for p in found[:20])
    assert found == walk(0)
    assert found != walk(1)
    assert {p.sign for p in found} == {"prune", "keep"}
    assert {p.spread for p in found} == {4, 7, 8, 9, 10, 12, 15, 20}


def test_random_programs_reach_every_operator_of_their_space_and_no_other():
    generator = random.Random(0)
    for space in (EVERYTHING, RELEASED):
        found = [random_program(generator, space) for _ in range(3000)]
        assert {name for p in found for name in p.pre} == set(space.pre)
        assert {p.reduce for p in found} == set(space.reduce)
        assert {name for p in found for name in p.post} == set(space.post)
        assert {p.spread for p in found} == set(space.spreads)
    assert RELEASED.spreads == (7, 8, 9, 10)
    assert set(RELEASED.pre) < set(PRE)
    assert set(RELEASED.reduce) < set(REDUCE)
    assert set(RELEASED.post) < set(POST)


def test_a_child_has_slots_of_both_parents_and_nothing_else():
    a = Program(("ABS",), "MEAN", ("SIN", "COS"), 7, "prune")
    b = Program(("LOG", "POW"), "VAR", ("EXP",), 9, "keep")
    generator = random.Random(0)
    found = {crossover(a, b, generator) for _ in range(200)}
    assert found == {
        Program(("ABS",), "VAR", ("EXP",), 9, "keep"),
        Program(("ABS",), "MEAN", ("EXP",), 9, "keep"),
        Program(("ABS",), "MEAN", ("SIN",), 9, "keep"),
        Program(("ABS",), "MEAN", ("SIN", "COS"), 9, "keep"),
        Program(("ABS",), "MEAN", ("SIN", "COS"), 7, "keep"),
    }


def test_a_mutation_changes_one_place_and_always_something():
    parent = Program((), "MEAN", ("SIN", "COS"), 7, "prune")
    generator = random.Random(0)
    changed = set()
    for _ in range(500):
        child = mutate(parent, generator)
        differing = [f.name for f in dataclasses.fields(Program) if getattr(child, f.name) != getattr(parent, f.name)]
        assert len(differing) == 1
        if differing == ["post"]:
            assert sum(x != y for x, y in zip(child.post, parent.post, strict=True)) == 1
        changed.add(differing[0])
    assert changed == {"pre", "reduce", "post", "spread", "sign"}
    one = dataclasses.replace(RELEASED, pre=("ABS",), reduce=("MEAN",), post=("SIN",), spreads=(7,))
    only = Program(("ABS", "ABS"), "MEAN", ("SIN", "SIN"), 7)
    assert mutate(only, generator, one) == only


def test_mutation_can_fill_a_slot():
    generator = random.Random(0)
    found = [mutate(Program(("ABS",), "MEAN", ("SIN",), 7), generator) for _ in range(200)]
    assert {len(program.pre) for program in found} == {len(program.post) for program in found} == {1, 2}


def test_packaged_programs_are_what_was_printed_and_what_is_said_of_them_holds():
    assert str(packaged_of("dsa-readme").program) == README
    assert all(packaged.provenance and packaged.remark for packaged in PACKAGED.values())
    parts = blocks()
    best = evaluate_program(packaged_of("dsa-poster-best").program, parts, 0.7)
    assert "the same for all 6 blocks, 1 to 1" in best.reasons[0]
    assert "the same for all" in evaluate_program(packaged_of("dsa-poster-graph").program, parts[:4], 0.7).reasons[0]
    assert "LOG of block" in evaluate_program(packaged_of("dsa-poster-second").program, parts, 0.7).reasons[0]
    assert evaluate_program(packaged_of("dsa-readme").program, parts, 0.7).valid
    assert evaluate_program(packaged_of("dsa-poster-first").program, parts, 0.7).valid
    with pytest.raises(ParedError, match="did you mean 'dsa-readme'"):
        packaged_of("dsa-redme")
