"""The class of a model by its configuration: of transformers, registered by the user, or code in the model's folder."""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import ParedError
from pared.models.trust import trusted
from pared.names import called

if TYPE_CHECKING:  # that there is no such model is reported without it
    from transformers import PretrainedConfig

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
)


def architecture(config: "PretrainedConfig", name: str, location: str) -> Any:
    """Return the class that ``config.architectures`` names.

    Args:
        config: of the model.
        name: of it, for messages.
        location: its folder or Hub id, for code that lies there.

    Raises:
        ParedError: it names none, one that is not installed, or one whose code may not run.
    """
    import transformers

    listed = getattr(config, "architectures", None) or []
    own = False
    for candidate in listed if isinstance(listed, list) else []:
        refs = _own_class_refs(config, candidate)
        if refs and trusted():
            return _code_of(config, name, location, refs)
        registered = _registered(config, candidate)
        found = registered or getattr(transformers, candidate, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        own |= bool(refs)
    if own:
        refuse_code(name, ValueError("trust_remote_code"))
    if not listed:
        raise ParedError(
            f"model {name!r}: config.json names no architectures, and a {config.model_type!r} can be one of several: "
            'add the one that was saved, such as "architectures": ["BertForMaskedLM"]'
        )
    raise ParedError(
        f"model {name!r}: config.json names architectures {str(listed)[:200]}, none of which transformers "
        f"{transformers.__version__} has; update transformers, or register the class with its Auto class if it is yours"
    )


def name_architectures(config: "PretrainedConfig") -> None:
    """Let a configuration that names no class name the one it can only be: of a decoder its language model."""
    from transformers.models.auto import modeling_auto

    if getattr(config, "architectures", None) or getattr(config, "auto_map", None):
        return
    kind, encoder_decoder = str(config.model_type), getattr(config, "is_encoder_decoder", False)
    if encoder_decoder:
        found = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(kind)
    elif kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        found = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    elif kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found = None  # an encoder: with which head, the configuration does not say
    else:
        found = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    config.architectures = [found] if isinstance(found, str) else []


def refuse_code(name: str, error: Exception) -> None:
    """Tell how to allow it, if what was wrong is that a folder's own code did not run.

    Raises:
        ParedError: it was.
    """
    if "trust_remote_code" in str(error) and not trusted():
        raise ParedError(
            f"model {name!r} comes with code of its own (`auto_map`), which does not run unasked; read it, and if you "
            f"trust it give {called('trust_remote_code', 'True')}"
        ) from None


def _code_of(config: "PretrainedConfig", name: str, location: str, refs: dict[str, str]) -> Any:
    """Load the class that lies in a folder, and let its Auto classes know it, as transformers does."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: Any = None
    for auto, ref in refs.items():
        repository, _, wanted = ref.rpartition("--")
        try:
            kind = get_class_from_dynamic_module(wanted, repository or location)
        except Exception as error:  # whatever that code raises
            raise ParedError(f"model {name!r}: its own code {ref} does not load ({first_line(error)})") from error
        mapping = getattr(transformers, auto)
        if type(config) not in mapping._model_mapping:
            mapping.register(type(config), kind, exist_ok=True)
    return kind


def _own_class_refs(config: "PretrainedConfig", candidate: str) -> dict[str, str]:
    """Return, by Auto class, what ``auto_map`` gives for a model class of this name: ``modeling_x.XForCausalLM``."""
    auto_map = getattr(config, "auto_map", None)
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    return {
        auto: ref
        for auto, ref in auto_map.items()
        if auto in AUTO_CLASSES and isinstance(ref, str) and ref.rpartition(".")[2] == candidate
    }


def _registered(config: "PretrainedConfig", candidate: str) -> Any:
    """Return the class of this name that somebody registered for a configuration (``AutoModel.register``), or None."""
    import transformers

    for auto in AUTO_CLASSES:
        listed = getattr(transformers, auto)._model_mapping.get(type(config), ())
        for cls in listed if isinstance(listed, (list, tuple)) else (listed,):
            if cls.__name__ == candidate:
                return cls
    return None


# Names of model classes outside of transformers that a configuration has called causal language models.
_own_causal: set[str] = set()


def note_causal(config: "PretrainedConfig") -> None:
    """Remember what a configuration says is a causal language model, for :func:`is_causal`."""
    auto_map = getattr(config, "auto_map", None)
    ref = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if isinstance(ref, str):
        _own_causal.add(ref.rpartition(".")[2])


def is_causal(architectures: Iterable[str]) -> bool:
    """Whether any of these model classes is a causal language model, which perplexity is defined for.

    One that reads images too is one, unless an encoder reads its text. A class outside of transformers is judged by its
    folder, or by the end of its name.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    named = set(architectures)
    seeing = named & set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    own = {name for name in named if name.endswith("ForCausalLM") and not hasattr(transformers, name)}
    causal = named & {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *_own_causal, *own}
    return bool(causal) or any(map(_only_decodes, seeing))


def _only_decodes(architecture: str) -> bool:
    import transformers

    config = getattr(transformers, architecture).config_class()
    return not getattr(config, "is_encoder_decoder", False)


def raised_in(error: BaseException) -> str:
    """Return where an error was raised, for a report: ``in modeling_rwkv.py, line 430, _init_weights``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"in {Path(frames[-1].filename).name}, line {frames[-1].lineno}, {frames[-1].name}" if frames else "nowhere"


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"
