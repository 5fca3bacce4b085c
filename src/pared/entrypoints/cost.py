"""Predicts what a compression costs, from shapes, on this machine or on one that is not at hand."""

import torch
from transformers import PreTrainedModel

from pared.engine.allocate import anatomy_of
from pared.engine.cost.channels import groups_by_shape, with_widths
from pared.engine.cost.measured import Measured
from pared.engine.cost.published import MACHINES, Published
from pared.engine.cost.rates import Rates
from pared.engine.cost.sizes import Tokens
from pared.engine.cost.stages import Work, seconds_of
from pared.engine.spec import CompressionSpec, ExpertSpec
from pared.engine.targets.opening import opened_shapes, shapes_of
from pared.entrypoints.compression.streamed import with_limits
from pared.entrypoints.compression.texts_read import read_texts
from pared.environment import device_of
from pared.errors import ParedError
from pared.memory import available_memory
from pared.models.architecture import is_causal
from pared.models.source import ModelSource
from pared.names import require_known
from pared.progress import Silent
from pared.schema.cost import Cost
from pared.schema.plan import Plan
from pared.structure.probe import probe_shapes


def _require_predicted(spec: CompressionSpec) -> None:
    """Refuse a compression of which nothing is predicted, before anything is measured or read.

    Raises:
        ParedError: experts are to be taken out, whose work depends on which are picked.
    """
    if isinstance(spec, ExpertSpec):
        raise ParedError("what taking experts out costs in time and memory is not predicted; leave the cost out")


def rates_of(machine: str | None = None, device: str = "auto") -> Rates:
    """Return what gives operations a time.

    Args:
        machine: the name of one by published figures; none for this one, which is measured.
        device: of this machine.

    Raises:
        ParedError: there is no machine of this name.
    """
    if machine is None:
        return Measured(str(device_of(device)))
    require_known("machine", machine, MACHINES)
    return MACHINES[machine]


def cost_of_source(source: ModelSource, spec: CompressionSpec, plan: Plan, rates: Rates) -> Cost:
    """Predict a compression of a model by name; its texts are read, if they are at hand, and no weight.

    Raises:
        ParedError: the model does not run on shapes alone, or experts are to be taken out of it.
    """
    _require_predicted(spec)
    skeleton = source.skeleton().to(source.declared_dtype(spec.recipe.dtype))
    calibrated, evaluated, notes = asked_tokens(spec)
    try:
        config = source.config()
        causal = is_causal(config.architectures or [])
        texts = read_texts(spec, config, causal, source.tokenizer(), Silent())
    except ParedError as error:
        notes = (*notes, f"texts are taken to be as long as asked for ({error})")
    else:
        calibrated = Tokens.of(texts.calibration, spec.recipe.calibration.batch)
        evaluated = Tokens.of(texts.evaluation, 1)
    return predict(skeleton, spec, plan, rates, calibrated, evaluated, notes)


def cost_of_loaded(model: PreTrainedModel, spec: CompressionSpec, plan: Plan, rates: Rates) -> Cost:
    """Predict a compression of a loaded model, on texts that are as long as asked for.

    Raises:
        ParedError: the model does not run on shapes alone, or experts are to be taken out of it.
    """
    _require_predicted(spec)
    return predict(shapes_of(model), spec, plan, rates, *asked_tokens(spec))


def asked_tokens(spec: CompressionSpec) -> tuple[Tokens | None, Tokens | None, tuple[str, ...]]:
    """Return what a recipe asks for of texts that are long enough, and what is to be said of it."""
    calibration, evaluation, notes = spec.recipe.calibration, spec.recipe.evaluation, list[str]()
    calibrated = evaluated = None
    if spec.calibrated:
        samples = calibration.samples or 256
        if calibration.samples is None:
            notes.append(f"the whole text is calibrated on; {samples} windows are predicted")
        calibrated = Tokens(samples, calibration.length, calibration.batch)
    if evaluation is not None and evaluation.windows is not None:
        evaluated = Tokens(evaluation.windows, evaluation.length, 1)
    elif evaluation is not None:
        notes.append("perplexity on a whole text is not predicted")
    return calibrated, evaluated, tuple(notes)


def predict(
    skeleton: PreTrainedModel,
    spec: CompressionSpec,
    plan: Plan,
    rates: Rates,
    calibrated: Tokens | None,
    evaluated: Tokens | None,
    notes: tuple[str, ...] = (),
) -> Cost:
    """Predict a compression.

    Args:
        skeleton: the model on the meta device, in the dtype it is loaded in.
        spec: of the compression.
        plan: made from shapes.
        rates: of the machine.
        calibrated: what is calibrated on; none where nothing is.
        evaluated: what perplexity is measured on; none where it is not.
        notes: what is to be said of it.

    Raises:
        ParedError: the model does not run on shapes alone.
    """
    skeleton = opened_shapes(skeleton, spec)
    anatomy = probe_shapes(skeleton, anatomy_of(skeleton, spec.recipe))
    model_dtype = str(skeleton.dtype).removeprefix("torch.")
    dtype = rates.compute_dtype(spec.recipe.calibration.dtype, model_dtype)
    if groups := groups_by_shape(anatomy, spec):
        plan = with_widths(plan, anatomy, spec, groups)
        notes = (
            *notes,
            f"widths are taken to be uniform, of {len(groups)} channel groups that are told by their shapes",
        )
    if isinstance(rates, Published):
        notes = (*notes, f"rates: {rates.source}; assumed: {rates.assumptions}")
    available = rates.memory if isinstance(rates, Published) else available_memory()
    _, needs = with_limits(skeleton, anatomy, spec, plan, calibrated, evaluated, getattr(torch, dtype), available)
    recipe = spec.recipe
    streamed = recipe.stream == "on" or (recipe.stream == "auto" and bool(needs[False].too_much(available)))
    if streamed and (problem := needs[True].too_much(available)):
        notes = (*notes, f"it does not fit: {problem}")
    work = Work(skeleton, anatomy, spec, plan, calibrated, evaluated, dtype, resident=not streamed)
    seconds, unknown = seconds_of(work, rates)
    if isinstance(rates, Measured):
        rates.keep()
    return Cost(
        machine=rates.machine,
        computed=rates.computed,
        seconds=seconds,
        memory=dict(needs[streamed].memory),
        disk=dict(needs[streamed].disk),
        streamed=streamed,
        unpredicted=tuple(unknown),
        notes=notes,
    )
