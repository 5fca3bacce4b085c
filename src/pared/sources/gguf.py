"""GGUF files as ordinary folders: dequantised once, kept in the user's cache."""

import contextlib
import importlib.util
import io
import logging
from pathlib import Path

from pared.digests import file_digest
from pared.errors import ParedError
from pared.files import cache_folder
from pared.staging import staged

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
    if importlib.util.find_spec("gguf") is None:
        raise ParedError(f"reading {gguf.name} needs the package gguf; install it with: pip install gguf")
    log.info("converting %s to safetensors, once; this takes some seconds", gguf.name)
    try:
        with staged(place, needed=8 * gguf.stat().st_size) as staging:
            _convert(gguf, staging)
    except ParedError:
        if not place.is_dir():  # else another process made the same thing first
            raise
    return place


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
        told = (str(error).strip().splitlines() or ["no message"])[0]
        raise ParedError(f"{gguf}: cannot be read as GGUF ({type(error).__name__}: {told[:200]})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
