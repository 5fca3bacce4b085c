"""The options of training methods that have many, and their defaults; read without torch."""

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
