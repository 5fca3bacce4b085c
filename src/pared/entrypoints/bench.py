"""How fast models are: names in, a comparison out; nothing of torch is imported before the first is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pared.environment import device_of, require_device, require_dtype
from pared.errors import ParedError
from pared.evaluation.speed import Settings, parse_case, preset
from pared.models.source import find_model
from pared.progress import Progress, Silent

if TYPE_CHECKING:
    from pared.evaluation.speed import Bench as Bench
    from pared.evaluation.speed import Timed as Timed


def settings_of(
    names: Sequence[str], cases: Sequence[str], preset_name: str, repeats: int, threads: int, dtype: str, device: str
) -> Settings:
    """Return what is timed and how, once nothing is wrong with it.

    Args:
        names: of the models.
        cases: such as ``prefill:4x512``; empty are those of the preset.
        preset_name: of cases.
        repeats: measured runs of every case and model.
        threads: of a CPU.
        dtype: what the models are loaded in.
        device: where they run.

    Raises:
        ParedError: an unknown dtype, device, case, preset or model, or nothing to measure.
    """
    require_dtype(dtype)
    if repeats < 1 or threads < 1:
        raise ParedError(f"{repeats} repeats on {threads} threads: expected at least 1 of each")
    timed = tuple(map(parse_case, cases)) if cases else preset(preset_name)
    for name in names:
        find_model(name)
    require_device(device)
    return Settings(timed, repeats, threads, dtype, device)


def bench(names: Sequence[str], settings: Settings, progress: Progress | None = None) -> "Bench":
    """Time models in turns.

    Args:
        names: of one model or two.
        settings: what is timed and how.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: a model cannot be loaded, or a process that times one has died.
    """
    settings = replace(settings, device=str(device_of(settings.device)))
    from pared.evaluation.speed import bench as measure

    steps = len(settings.cases) * settings.repeats * len(names)
    with (progress or Silent()).stage("bench", steps, "run") as advance:
        return measure(list(names), settings, advance)
