"""What may stand in a program, by name: a program is read and refused without torch, which evaluates it."""

from typing import Literal

Sign = Literal["prune", "keep"]  # what a high statistic asks for: a higher sparsity, or a lower one

# Of the tables in ``operators``, in their order; a test holds them against those.
PRE = ("NO_OP", "ABS", "LOG", "PAPER_LOG", "ABSLOG", "PAPER_ABSLOG", "POW", "SQRT", "EXP", "NORMALIZE", "NORM", "MMS",
       "SIGMOID", "TANH", "SOFTMAX", "LOGSOFTMAX")  # fmt: skip
REDUCE = ("MEAN", "VAR", "STD", "GEOMETRIC_MEAN", "L1_NORM", "FROBENIUS_NORM", "ENTROPY", "PAPER_ENTROPY", "CORREF",
          "RANK")  # fmt: skip
POST = ("NO_OP", "SIN", "COS", "TAN", "ASIN", "ACOS", "ATAN", "EXP", "LOG", "SQRT", "ABS", "SIGMOID", "TANH",
        "SOFTPLUS")  # fmt: skip
MATRIX_ONLY = frozenset({"GRAM", "DIAGONAL", "DETERMINANT", "SLOGDET"})
