"""Random programs, and children of programs: always grammatical, decided by the generator alone."""

from dataclasses import dataclass, replace
from random import Random

from pared.allocation.dsa.grammar import LIMIT, Program
from pared.allocation.dsa.names import Sign
from pared.allocation.dsa.operators import POST, PRE, REDUCE


@dataclass(frozen=True)
class Space:
    """What programs are drawn from.

    Attributes:
        pre: functions of a vector.
        reduce: reductions.
        post: functions of a scalar.
        spreads: 100 λ; the released code draws 7 to 10, and the best programs found there all had 10.
        signs: of the importance.
    """

    pre: tuple[str, ...] = tuple(PRE)
    reduce: tuple[str, ...] = tuple(name for name in REDUCE if name not in ("CORREF", "RANK"))  # constant, always
    post: tuple[str, ...] = tuple(POST)
    spreads: tuple[int, ...] = (4, 7, 8, 9, 10, 12, 15, 20)
    signs: tuple[Sign, ...] = ("prune", "keep")


EVERYTHING = Space()
RELEASED = Space(  # the released code's lists, and its one direction
    pre=("NO_OP", "ABS", "LOG", "ABSLOG", "POW", "EXP", "NORMALIZE", "SIGMOID", "TANH", "MMS"),
    reduce=("FROBENIUS_NORM", "L1_NORM", "GEOMETRIC_MEAN", "MEAN", "VAR", "STD", "ENTROPY"),
    post=tuple(name for name in POST if name != "SQRT"),
    spreads=(7, 8, 9, 10),
    signs=("prune",),
)


def random_program(generator: Random, space: Space = EVERYTHING) -> Program:
    """Draw a program: 0 to 2 functions of a vector (NO_OP for none), a reduction, 1 or 2 functions of a scalar.

    Args:
        generator: of all randomness.
        space: what to draw from.
    """
    pre = tuple(generator.choice(space.pre) for _ in range(generator.randint(0, LIMIT)))
    reduce = generator.choice(space.reduce)
    post = tuple(generator.choice(space.post) for _ in range(generator.randint(1, LIMIT)))
    return Program(pre or ("NO_OP",), reduce, post, generator.choice(space.spreads), generator.choice(space.signs))


def crossover(a: Program, b: Program, generator: Random) -> Program:
    """Return a child with the slots of ``a`` up to a random cut and those of ``b`` behind it.

    The slots are pre, reduce, the first and the second function of the scalar, spread and sign.

    Args:
        a: gives at least the first slot.
        b: gives at least the last.
        generator: of the cut.
    """
    cut = generator.randint(1, 5)

    def parent(slot: int) -> Program:
        return a if slot < cut else b

    return Program(
        pre=parent(0).pre,
        reduce=parent(1).reduce,
        post=parent(2).post[:1] + parent(3).post[1:],
        spread=parent(4).spread,
        sign=parent(5).sign,
    )


def mutate(program: Program, generator: Random, space: Space = EVERYTHING) -> Program:
    """Return the program with one operator, its spread or its sign replaced by another of the same slot.

    A slot with room may be given one more operator: programs of one operator could never grow otherwise. Every change
    the space allows leads to a different program; the place is drawn first, then what to put there. A program for which
    the space leaves no choice comes back as it is.

    Args:
        program: the parent.
        generator: of all randomness.
        space: what to draw from.
    """
    places = [
        *([_with_pre(program, at, name) for name in space.pre] for at in range(min(LIMIT, len(program.pre) + 1))),
        [replace(program, reduce=name) for name in space.reduce],
        *([_with_post(program, at, name) for name in space.post] for at in range(min(LIMIT, len(program.post) + 1))),
        [replace(program, spread=spread) for spread in space.spreads],
        [replace(program, sign=sign) for sign in space.signs],
    ]
    changes = [others for place in places if (others := [child for child in place if child != program])]
    return generator.choice(generator.choice(changes)) if changes else program


def _with_pre(program: Program, at: int, name: str) -> Program:
    return replace(program, pre=(*program.pre[:at], name, *program.pre[at + 1 :]))


def _with_post(program: Program, at: int, name: str) -> Program:
    return replace(program, post=(*program.post[:at], name, *program.post[at + 1 :]))
