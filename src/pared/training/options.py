"""The options of training methods: defaults, and what is refused of them; read without torch."""

from collections.abc import Mapping
from typing import Any

# lora
FACTORS, ORDERS = ("up", "down", "both"), ("together", "sequential")
ALL, PEFT = "compressed", "peft"  # in place of patterns: every layer that pared made; what PEFT adapts by itself
# full
PARTS = ("factors", "factors+norms", "all")
# basel
IMPORTANCES = ("magnitude", "fisher", "bsi")
BASES = ("weight", "outputs")
HELD = ("bfloat16", "float32")

LORA: dict[str, bool | int | float | str] = {
    "rank": 8,
    "alpha": 32,
    "dropout": 0.0,
    "targets": "compressed",
    "factor": "up",
    "order": "together",
}

BASEL: dict[str, bool | int | float | str] = {
    "keep_ratio": 0.5,
    "keep": 0.0,
    "prunes": 100,
    "keeping_epochs": 1.0,
    "pruning_epochs": 2.0,
    "post_epochs": 3.0,
    "new": 32,
    "relearn": True,
    "coefficient_rate": 1.0,
    "importance": "magnitude",
    "l1": 0.0,
    "probes": 1,
    "basis": "weight",
    "bases": "bfloat16",
    "skip": "",
}


def check_lora(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an unknown value, or a number out of range.
    """
    for name, valid in (("factor", FACTORS), ("order", ORDERS)):
        if options[name] not in valid:
            raise ValueError(f"option {name}: expected one of {', '.join(valid)}, found {options[name]!r}")
    if options["targets"] in FACTORS:
        raise ValueError(f"option targets names layers by pattern, such as *.q_proj,*.v_proj; which factor of them is "
                         f"adapted is option factor: factor={options['targets']}")  # fmt: skip
    if not patterns_of(options["targets"]):
        raise ValueError(f"option targets: expected {ALL}, {PEFT} or patterns of layers with commas, found ''")
    if options["rank"] < 1:
        raise ValueError(f"option rank: expected 1 or more, found {options['rank']}")
    if not options["alpha"] > 0:
        raise ValueError(f"option alpha: expected more than 0, found {options['alpha']}")
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"option dropout: expected a share, 0 to below 1, found {options['dropout']}")


def patterns_of(targets: str) -> list[str]:
    """Return the patterns of a text with commas."""
    return [pattern for part in targets.split(",") if (pattern := part.strip())]


def check_full(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an unknown part.
    """
    if options["train"] not in PARTS:
        raise ValueError(f"option train: expected one of {', '.join(PARTS)}, found {options['train']!r}")


def check_distill(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: a temperature of 0 or less, a share that is none, or a negative weight or rank.
    """
    if not options["temperature"] > 0:
        raise ValueError(f"option temperature: expected more than 0, found {options['temperature']}")
    if not 0 <= options["text"] <= 1:
        raise ValueError(f"option text: expected a share, 0 to 1, found {options['text']}")
    if options["adapters"] < 0:
        raise ValueError(f"option adapters: expected a rank, or 0 for none, found {options['adapters']}")
    if options["hidden"] < 0:
        raise ValueError(f"option hidden: expected 0 or more, found {options['hidden']}")


def check_basel(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an unknown value, or a number out of range.
    """
    for name, valid in (("importance", IMPORTANCES), ("basis", BASES), ("bases", HELD)):
        if options[name] not in valid:
            raise ValueError(f"option {name}: expected one of {', '.join(valid)}, found {options[name]!r}")
    for name in ("keep_ratio", "keep"):
        if not (0 < options[name] <= 1 or (name == "keep" and options[name] == 0)):
            raise ValueError(f"option {name}: expected a fraction, above 0 and at most 1, found {options[name]}")
    for name, least in (("prunes", 1), ("probes", 1), ("new", 0), ("keeping_epochs", 0), ("post_epochs", 0)):
        if options[name] < least:
            raise ValueError(f"option {name}: expected {least} or more, found {options[name]}")
    if not options["coefficient_rate"] > 0:
        raise ValueError(f"option coefficient_rate: expected more than 0, found {options['coefficient_rate']}")
    if not options["pruning_epochs"] > 0:
        raise ValueError(f"option pruning_epochs: expected more than 0, found {options['pruning_epochs']}")
    _check_penalty(options)


def _check_penalty(options: Mapping[str, Any]) -> None:
    if options["l1"] < 0:
        raise ValueError(f"option l1: expected 0 for none, or the weight of the penalty, found {options['l1']}")
    if options["l1"] and (options["importance"] != "magnitude" or not options["relearn"]):
        raise ValueError("option l1 is a penalty on coefficients that are learned, in place of dropping bases by "
                         "importance: it goes with importance=magnitude and relearn=true alone")  # fmt: skip
