"""From a name or a folder to a model, dense or compressed alike."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import name_from
from pared.checkpoint.format import QUANT_METHOD, ParedConfig
from pared.environment import dtype_of
from pared.errors import ParedError
from pared.io.record import MANIFEST, SUMS, recorded, require_own_sum, require_whole
from pared.models.architecture import first_line
from pared.models.loaded import loaded_as
from pared.models.source import ModelSource, find_model
from pared.models.trust import trusting
from pared.structure.finite import require_finite

log = logging.getLogger(__name__)


def load(
    name: str | Path, dtype: str | torch.dtype = "auto", check: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model, dense or compressed, in evaluation mode on the CPU.

    The arguments are those of :func:`pared.load`; of a folder of every size this is its largest.

    Raises:
        ParedError: not a model, truncated, of a newer format version, NaN or infinity in a weight, or not the files
            that were written; with ``check`` also one that lists no SHA-256 to compare with.
    """
    name = name_from(name, "pared.load")
    dtype_of(dtype)  # what is none is refused before anything is read
    with trusting(trust_remote_code):
        if check:
            name = str(_checked(name))
        read_config(name)
        model = find_model(name, dtype).load(dtype)
    require_finite(model, name)
    return loaded_as(model, name)


def _checked(name: str) -> Path:
    """Return the folder of a model, every file of which is the one that was written.

    Raises:
        ParedError: a file is not, or the model lists no SHA-256.
    """
    folder = _folder_of(find_model(name))
    if recorded(folder) is None:
        raise ParedError(
            f"model {name!r}: check=True compares files with their recorded SHA-256, and neither {MANIFEST} nor {SUMS} "
            "lists any there; load it without, if you know where it comes from"
        )
    require_recorded(folder)
    return folder


def _folder_of(source: ModelSource) -> Path:
    """Return the folder with a model's files as they are; what lies on the Hub is fetched whole."""
    path = Path(source.place)
    if path.is_file():
        raise ParedError(f"model {source.name!r}: check=True needs a folder that pared made, got a single file")
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.place))
    except Exception as error:  # huggingface_hub raises many kinds
        raise ParedError(f"model {source.name!r}: cannot be fetched ({first_line(error)})") from None


def require_recorded(folder: Path) -> None:
    """Check every file of a folder against the SHA-256 that was recorded for it; note where none was.

    Raises:
        ParedError: a file is missing or not the one that was written.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        require_own_sum(manifest)
    files = recorded(folder)
    if files is None:
        log.warning("%s lists no SHA-256 of its files; an earlier pared, or another program, wrote it", folder)
    else:
        require_whole(folder, files)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of any named model.

    Args:
        name: as for :func:`load`.
        trust_remote_code: whether code that lies beside it may run.

    Raises:
        ParedError: there is none.
    """
    with trusting(trust_remote_code):
        return find_model(name_from(name, "pared.load_tokenizer")).tokenizer()


def read_config(name: str) -> PretrainedConfig:
    """Read a model's configuration and check that its format can be read.

    Raises:
        ParedError: not a model, or of a newer format version.
    """
    config = find_model(name).config()
    if is_compressed(config):
        try:
            ParedConfig(**_fields(config))
        except (ValueError, TypeError) as error:
            raise ParedError(f"model {name!r}: {error}") from None
    return config


def read_map(name: str) -> dict[str, dict[str, Any]]:
    """Return the map of a folder: the entry of every changed module, none for a dense model.

    Raises:
        ParedError: not a model, or of a newer format version.
    """
    config = read_config(name)
    return _fields(config).get("modules") or {} if is_compressed(config) else {}


def read_shared(name: str) -> dict[str, str]:
    """Return the shared tensors of a folder: for every tensor that is not stored, the name of the one that is.

    Raises:
        ParedError: not a model, or of a newer format version.
    """
    config = read_config(name)
    return _fields(config).get("shared") or {} if is_compressed(config) else {}


def is_compressed(config: PretrainedConfig) -> bool:
    """Whether a configuration says that pared made the weights."""
    return _fields(config).get("quant_method") == QUANT_METHOD


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    stored = getattr(config, "quantization_config", None) or {}
    quantization: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    return quantization
