"""GGUF files as ordinary folders: dequantised once, kept in the user's cache."""

import contextlib
import importlib.util
import io
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import ParedError
from pared.io.digests import file_digest
from pared.io.files import cache_folder
from pared.io.output_dir import staged
from pared.models.gguf_header import Header, read_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


def converted(gguf: Path) -> Path:
    """Return the folder of the dequantised safetensors twin of a GGUF file, made once.

    The twin is staged beside its place, so a killed conversion leaves nothing that could be taken for a model.

    Raises:
        ParedError: the file cannot be read, or the cache cannot be written.
    """
    place = cache_folder() / "models" / f"{gguf.stem}-{file_digest(gguf)[:16]}"
    if place.is_dir():
        return place
    _require_reader(gguf)
    log.info("converting %s to safetensors, once; this takes some seconds", gguf.name)
    try:
        with staged(place, needed=8 * gguf.stat().st_size) as staging:
            _convert(gguf, staging)
    except ParedError:
        if not place.is_dir():  # else another process made the same thing first
            raise
    return place


def header_of(gguf: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        ParedError: it cannot be read.
    """
    try:
        return read_header(gguf)
    except (OSError, ValueError) as error:
        raise ParedError(f"{gguf}: cannot be read as GGUF ({error})") from None


def config_of(gguf: Path) -> "PretrainedConfig":
    """Return the configuration that the twin of a GGUF file has, from the header alone.

    Raises:
        ParedError: the file cannot be read, or transformers does not know its architecture.
    """
    _require_reader(gguf)
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    header = header_of(gguf)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).write_bytes(header.without_weights())
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
        except Exception as error:  # gguf and transformers each raise their own
            raise _unreadable(gguf, error) from error
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = config.architectures or ([made] if made else None)
    config.dtype, config.name_or_path = torch.float32, str(gguf)
    return config


def _require_reader(gguf: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ParedError(f"reading {gguf.name} needs the package gguf; install it with: pip install gguf")


def _unreadable(gguf: Path, error: Exception) -> ParedError:
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return ParedError(f"{gguf}: cannot be read as GGUF ({type(error).__name__}: {line[:200]})")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # gguf, torch and transformers each raise their own
        raise _unreadable(gguf, error) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
