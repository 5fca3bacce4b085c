"""Decisions that are tried: put in place for a moment, and measured on tokens that are not calibrated on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version as pared_version

from pared.allocation import Evidence
from pared.data.windows import Windows, require_fits
from pared.engine.observe import Observer
from pared.engine.ranks.kept_units import KeptUnits
from pared.engine.spec import LowRankSpec
from pared.engine.state.records import Order
from pared.engine.windows import trial_windows
from pared.errors import ParedError
from pared.io.digests import model_digest
from pared.names import called
from pared.schema.plan import Decision
from pared.structure.store import ResidentBlocks

Trial = Callable[[Windows], float]  # measures the model as it is on windows; less is better


def with_trials(
    evidence: Evidence, observer: Observer, spec: LowRankSpec, units: KeptUnits, trial: Trial | None, order: Order
) -> Evidence:
    """Return the evidence with what measures decisions, and what a result depends on besides them.

    Args:
        evidence: of the allocation.
        observer: of the model.
        spec: of the compression, whose allocation tries what it proposes.
        units: what was decomposed.
        trial: measures the model.
        order: has all processes take part in a trial.

    Raises:
        ParedError: nothing measures the model, it cannot read windows that long, or processes cannot do it together.
    """
    windows = trial_windows(spec.recipe, observer.tokenizer, observer.model.config)
    require_fits(observer.model.config, windows)
    store = observer.store
    if trial is None:
        raise ParedError(f"allocation {spec.allocator.name} tries what it proposes; give what measures a model")
    if observer.processes.count > 1 and not isinstance(store, ResidentBlocks):
        raise ParedError(
            f"allocation {spec.allocator.name} tries what it proposes, which several processes cannot do on a model "
            f"that is read block by block; start one, or keep the model in memory ({called('stream', 'off')})"
        )

    def measure(decisions: Mapping[str, Decision]) -> float:
        order(decisions)
        with units.installed(decisions, store):
            return trial(windows)

    return replace(evidence, trial=measure, key=_key(observer, spec, windows))


def _key(observer: Observer, spec: LowRankSpec, trials: Windows) -> str:
    """Return what a trial's result depends on, but for the decisions tried."""
    calibrated = None if observer.windows is None else observer.windows.digest
    digest = model_digest(observer.model, observer.store.tensors())
    asked = [spec.method.name, spec.config.model_dump(), spec.budget.pivoted, spec.calibration.model_dump()]
    return json.dumps([digest, trials.digest, calibrated, *asked, pared_version("pared")])
