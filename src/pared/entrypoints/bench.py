"""How fast models are: names in, a comparison out; nothing of torch is imported before the first is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pared.data.texts import require_text
from pared.environment import device_of, require_device, require_dtype
from pared.errors import ParedError
from pared.evaluation.speed import Settings, parse_case, preset
from pared.evaluation.speed.settings import require_draftable
from pared.models.source import find_model
from pared.names import called
from pared.progress import Progress, Silent

if TYPE_CHECKING:
    from pared.evaluation.speed import Bench as Bench
    from pared.evaluation.speed import Drafted as Drafted
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


def draft_settings_of(
    names: Sequence[str],
    cases: Sequence[str],
    preset_name: str,
    repeats: int,
    threads: int,
    dtype: str,
    device: str,
    text: str,
    draft_tokens: int,
) -> Settings:
    """Return what a draft is timed on and how, once nothing is wrong with it.

    Args:
        names: of the draft, and of its parent if it was named.
        cases: such as ``decode:1x64+64``; empty are those of the preset.
        preset_name: of cases; ``default`` is that of drafts.
        repeats: prompts.
        threads: of a CPU.
        dtype: what the models are loaded in.
        device: where they run.
        text: by name, of which the prompts are cut.
        draft_tokens: proposed before every pass of the parent.

    Raises:
        ParedError: no parent or text, a case that is no decoding of one text, or what :func:`settings_of` refuses.
    """
    if len(names) < 2:
        raise ParedError(f"{names[0]} is a draft of no model; name its parent with {called('against', 'MODEL')}")
    if draft_tokens < 1:
        raise ParedError(f"{draft_tokens} tokens of a draft: expected at least 1")
    named = "draft" if preset_name == "default" else preset_name
    settings = settings_of(names, cases, named, repeats, threads, dtype, device)
    require_draftable(settings.cases)
    require_text(text, evaluation=True)
    return settings


def draft(
    names: Sequence[str], settings: Settings, text: str, draft_tokens: int, progress: Progress | None = None
) -> "list[Drafted]":
    """Time a model with a draft against itself without, case by case, and check that its text stays as it is.

    Args:
        names: of the draft and of its parent.
        settings: what is timed and how; ``repeats`` prompts of every case.
        text: by name, of which the prompts are cut, one behind the other.
        draft_tokens: proposed before every pass of the parent.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: a model cannot be loaded, they have other vocabularies, the text is too short, or the text that is
            written is another with the draft.
    """
    import torch

    from pared.checkpoint import load, load_tokenizer
    from pared.data import cut, find_text
    from pared.evaluation.speed import drafted
    from pared.evaluation.speed.bench import require_fits

    for name in names:
        require_fits(name, settings.cases)
    device = device_of(settings.device)
    draft_name, parent_name = names
    tokenizer = load_tokenizer(parent_name)
    if load_tokenizer(draft_name).get_vocab() != tokenizer.get_vocab():
        raise ParedError(f"{draft_name} and {parent_name} have different vocabularies; a draft proposes tokens of its "
                         "parent's")  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        parent, small = (load(name, settings.dtype).to(device).eval() for name in (parent_name, draft_name))
        source = find_text(text, evaluation=True, tokenizer=tokenizer)
        results = []
        with (progress or Silent()).stage("draft", len(settings.cases) * settings.repeats, "prompt") as advance:
            for case in settings.cases:
                prompts = cut(source, tokenizer, case.length, settings.repeats).tokens.to(device)
                results.append(drafted(parent, small, prompts, case.new, draft_tokens, on_run=advance))
        return results
    finally:
        torch.set_num_threads(before)
