"""GGUF files as ordinary folders: dequantised tensor by tensor, once, and kept in the user's cache."""

import copy
import functools
import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pared.environment import dtype_of
from pared.errors import ParedError
from pared.io.digests import file_digest
from pared.models.architecture import architecture, first_line
from pared.models.gguf_header import Header, read_header
from pared.models.pre_tokenizers import cut_as
from pared.models.twin import made_once, twin_folder, write_safetensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CONVERTER = 2  # what a twin of the same file holds depends on it: one more whenever that changes, tokenizer included


def converted(gguf: Path, dtype: str) -> Path:
    """Return the folder of the dequantised safetensors twin of a GGUF file, made once a version of the converter.

    The file is read tensor by tensor; memory: one block and one tensor in float32.

    Args:
        gguf: the file.
        dtype: of the twin.

    Raises:
        ParedError: the file cannot be read, or the cache cannot be written.
    """
    header, itemsize = header_of(gguf), 4 if dtype == "float32" else 2
    suffix = "" if dtype == "float32" else f"-{dtype}"
    place = twin_folder(f"{gguf.stem}-{file_digest(gguf)[:16]}{suffix}-v{CONVERTER}")
    size = itemsize * header.parameters

    def convert(folder: Path) -> None:
        log.info("converting %s to safetensors in %s, once: %s bytes in %s", gguf.name, dtype, f"{size:,}", place)
        _convert(gguf, header, dtype, folder)

    return made_once(place, size, convert)


def header_of(gguf: Path) -> Header:
    """Return the header of a GGUF file, read once a process.

    Raises:
        ParedError: it cannot be read.
    """
    try:
        status = gguf.stat()
        return _header(gguf, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        raise ParedError(f"{gguf}: cannot be read as GGUF ({error})") from None


@functools.lru_cache(maxsize=8)
def _header(gguf: Path, *_: int) -> Header:
    return read_header(gguf)


def config_of(gguf: Path, dtype: str) -> "PretrainedConfig":
    """Return the configuration that the twin of a GGUF file has, from the header alone, made once a process.

    Raises:
        ParedError: the file cannot be read, or transformers does not know its architecture.
    """
    header_of(gguf)  # says what is wrong with the file
    status = gguf.stat()
    return copy.deepcopy(_config(gguf, dtype, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=8)
def _config(gguf: Path, dtype: str, *_: int) -> "PretrainedConfig":
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with slim(gguf) as folder, _readable(gguf):
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = config.architectures or ([made] if made else None)
    config.dtype, config.name_or_path = dtype_of(dtype), str(gguf)
    return config


@contextmanager
def slim(gguf: Path) -> Iterator[Path]:
    """Give a folder with a GGUF file of the same name and header, without vocabulary and weights.

    The gguf package, by which transformers reads most architectures, takes seconds for a vocabulary.

    Raises:
        ParedError: the file cannot be read, or that package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ParedError(f"reading {gguf.name} needs the package gguf; install it with: pip install gguf")
    header = header_of(gguf)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).write_bytes(header.without_weights())
        yield Path(folder)


def _tokenizer(gguf: Path, config: "PretrainedConfig") -> "PreTrainedTokenizerBase":
    """Make the tokenizer of a GGUF file, by the class that ``AutoTokenizer`` takes.

    It would read the whole file for the configuration first, with the vocabulary element by element.
    """
    from transformers import TOKENIZER_MAPPING, PreTrainedTokenizerFast

    kind = TOKENIZER_MAPPING.get(type(config), None) or PreTrainedTokenizerFast
    if kind.__name__ == "MistralCommonBackend":  # reads another form of file only
        kind = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    fields = header_of(gguf).fields
    if fields.get("tokenizer.ggml.model") == "gpt2" and (core := getattr(tokenizer, "backend_tokenizer", None)):
        cut_as(core, str(fields.get("tokenizer.ggml.pre")))  # which transformers passes over
    return tokenizer


@contextmanager
def _readable(gguf: Path) -> Iterator[None]:
    """Report whatever goes wrong inside as a fault of the file."""
    try:
        yield
    except ParedError:
        raise
    except Exception as error:  # gguf, torch and transformers each raise their own
        raise ParedError(f"{gguf}: cannot be read as GGUF ({first_line(error)})") from error


def _convert(gguf: Path, header: Header, dtype: str, folder: Path) -> None:
    from transformers import GenerationConfig

    from pared.models.gguf_weights import dequantised

    config = config_of(gguf, dtype)
    kind = architecture(config, str(gguf), str(gguf.parent))
    with _readable(gguf):
        write_safetensors(dequantised(gguf, header, kind, config), folder)
        config.save_pretrained(folder)
        if kind.can_generate():
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        _tokenizer(gguf, config).save_pretrained(folder)
