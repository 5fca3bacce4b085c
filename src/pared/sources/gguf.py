"""GGUF files as ordinary folders: dequantised once, kept in the user's cache."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
from pathlib import Path

import platformdirs
import torch

from pared.errors import ParedError
from pared.staging import staged

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the user's cache folder of pared, ``PARED_CACHE`` if that is set."""
    return Path(os.environ.get("PARED_CACHE") or platformdirs.user_cache_dir("pared"))


def converted(gguf: Path) -> Path:
    """Return the folder of the dequantised safetensors twin of a GGUF file, made once.

    The twin is staged beside its place, so a killed conversion leaves nothing that could be taken for a model.

    Raises:
        ParedError: the file cannot be read, or the cache cannot be written.
    """
    place = cache_folder() / "models" / f"{gguf.stem}-{_digest(gguf)[:16]}"
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # gguf, torch and transformers each raise their own
        told = (str(error).strip().splitlines() or ["no message"])[0]
        raise ParedError(f"{gguf}: cannot be read as GGUF ({type(error).__name__}: {told[:200]})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
