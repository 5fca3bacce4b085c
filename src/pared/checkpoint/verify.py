"""The self-check: what is on disk, loaded again, must answer what the model in memory answered."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pared.arguments import name_from
from pared.checkpoint.load import load, read_config, read_map, read_shared, require_recorded
from pared.checkpoint.loader import empty_module
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.opened_blocks import layer_of
from pared.checkpoint.portable import module_map
from pared.checkpoint.streamed import StreamedBlocks
from pared.errors import DamagedError, ParedError
from pared.io.guarded import require_regular_files
from pared.memory import Stream, streams
from pared.models.source import find_model
from pared.models.trust import trusted, trusting
from pared.schema.manifest import Fingerprint, Manifest
from pared.structure import weight_of
from pared.structure.probe import hooks, without_cache

TOKENS, SAMPLES = 16, 64
LAYERS, LAYER_SAMPLES = 64, 8  # the most of those the tokens do not reach, and of their outputs
# Largest difference, relative to the largest output, that another machine or kernel may make.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def take_fingerprint(model: PreTrainedModel, store: StreamedBlocks | None = None) -> Fingerprint:
    """Run a fixed sequence through the model and sample its outputs at the last token, and layers it does not reach.

    Args:
        model: dense or compressed.
        store: of the model, where its blocks are not in memory.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [(7 + 37 * index) % vocabulary for index in range(TOKENS)]
    reached: set[str] = set()
    with hooks(_note_reached(model, reached)):
        outputs = _outputs(model, tokens, store)
    step = max(1, len(outputs) // SAMPLES)
    positions = list(range(0, len(outputs), step))[:SAMPLES]
    unreached = [name for name in module_map(model) if name not in reached]
    few = unreached[:: max(1, len(unreached) // LAYERS)][:LAYERS]
    layers = {name: _layer_outputs(_layer(model, name), name, store).tolist() for name in few}
    return Fingerprint(tokens=tokens, positions=positions, outputs=outputs[positions].tolist(), layers=layers)


def with_layers(fingerprint: Fingerprint, model: PreTrainedModel, names: Iterable[str]) -> Fingerprint:
    """Return a fingerprint with what some of its layers make now, as those that were widened have other sizes.

    Args:
        fingerprint: of the model as it was.
        model: as it is, its experts open or not.
        names: of layers of the fingerprint.
    """
    now = {name: _layer_outputs(_layer(model, name), name, None).tolist() for name in names}
    return fingerprint.model_copy(update={"layers": {**fingerprint.layers, **now}})


def compare(model: PreTrainedModel, fingerprint: Fingerprint, store: StreamedBlocks | None = None) -> float:
    """Return the largest difference of a model's outputs from a fingerprint, relative to the largest output.

    Args:
        model: dense or compressed.
        fingerprint: of the model that was saved.
        store: of the model, where its blocks are not in memory.

    Raises:
        ParedError: the difference is more than kernels can make: the folder does not hold the model that was saved.
    """
    outputs = _outputs(model, fingerprint.tokens, store)
    if max(fingerprint.positions) >= len(outputs):
        raise ParedError(
            f"self-check failed: {len(outputs)} outputs, expected at least {max(fingerprint.positions) + 1}"
        )
    found = {"the loaded model": (outputs[fingerprint.positions], fingerprint.outputs)}
    for name, sample in fingerprint.layers.items():
        found[f"layer {name}"] = (_layer_outputs(_layer(model, name), name, store), sample)
    return max(_difference(what, now, then, model.dtype) for what, (now, then) in found.items())


def _layer(model: PreTrainedModel, name: str) -> nn.Module:
    layer = layer_of(model, name)
    if layer is None or not hasattr(layer, "weight"):
        raise ParedError(f"the fingerprint in pared.json has a layer {name[:200]}, that this model does not have")
    return layer


def _difference(what: str, found: torch.Tensor, sample: list[float], dtype: torch.dtype) -> float:
    """Return the largest difference, relative to the largest output, if kernels can make it."""
    expected = torch.tensor(sample)
    if found.shape != expected.shape:
        raise ParedError(f"the fingerprint in pared.json has {len(sample)} outputs of {what}, expected {len(found)}")
    scale = float(expected.abs().max().clamp(min=1e-6))
    difference = float((found - expected).abs().max()) / scale
    allowed = TOLERANCE.get(dtype, 5e-2)
    if not difference <= allowed:
        raise DamagedError(
            f"self-check failed: the outputs of {what} differ from the saved model's by {difference:.3g} of the "
            f"largest output (allowed {allowed:g})",
            "the folder is damaged or was loaded without pared",
        )
    return difference


def _note_reached(model: PreTrainedModel, reached: set[str]) -> Iterator[Any]:
    """Hook every compressed layer to note its name when it runs."""
    for name in module_map(model):
        yield model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: reached.add(name))


@torch.no_grad()
def _layer_outputs(layer: nn.Module, name: str, store: StreamedBlocks | None) -> torch.Tensor:
    """Return a sample of what a linear layer, compressed or not, makes of a fixed input, float32 on the CPU."""
    with nullcontext() if store is None else store.holding(name):
        like = next(layer.parameters())
        width: int = getattr(layer, "in_features", None) or weight_of(layer).shape[1]
        fixed = torch.cos(torch.arange(width, dtype=torch.float32)).to(like.device, like.dtype)
        outputs = layer(fixed.unsqueeze(0))[0].float().cpu()
    return outputs[:: max(1, len(outputs) // LAYER_SAMPLES)][:LAYER_SAMPLES]


def require_tensors(folder: Path) -> int:
    """Check that every tensor of the map is in the folder's files with its shape; return the bytes of the weights.

    A shared tensor need not be there, as its owner is; if it is, it must be equal.

    Raises:
        ParedError: a file is missing or truncated, or a tensor is missing, misshapen or not its owner; names it.
    """
    require_regular_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ParedError(f"{folder} has no .safetensors file")
    stored = stored_tensors(files)
    shared = read_shared(str(folder))
    expected = {
        f"{name}.{part}": empty
        for name, entry in read_map(str(folder)).items()
        for part, empty in empty_module(entry, device="meta").state_dict().items()
    }
    if expected.keys() - stored.keys() - shared.keys():
        stored = _by_their_own_names(stored, expected)
    for tensor, empty in expected.items():
        shape = tuple(empty.shape)
        if tensor in shared and tensor not in stored:
            continue
        found = stored[tensor].shape if tensor in stored else "missing"
        if found != shape:
            raise ParedError(f"{folder}: {tensor} is {found}, the map says {shape}")
        if tensor.endswith(".order") and not _is_order(stored[tensor].read()):
            raise ParedError(f"{folder}: {tensor} is not a permutation of 0 to {shape[0] - 1}; it is damaged")
    for alias, owner in shared.items():
        if alias in stored and not torch.equal(stored[alias].read(), stored[owner].read()):
            raise ParedError(
                f"{folder}: {alias} is stored and differs from {owner}, but the map says they are one; if that is "
                "meant, call pared.checkpoint.mark on the model and save it again, else fetch or make the folder again"
            )
    return sum(file.stat().st_size for file in files)


class _Stored(NamedTuple):
    """One tensor of a file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            values: torch.Tensor = tensors.get_tensor(self.name)
        return values


def stored_tensors(files: list[Path]) -> dict[str, _Stored]:
    """Return the tensors of files by name."""
    found: dict[str, _Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    found[name] = _Stored(file, name, tuple(tensors.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{file}: unreadable or truncated ({error})", "fetch or make it again") from None
    return found


def _by_their_own_names(stored: dict[str, _Stored], tensors: Iterable[str]) -> dict[str, _Stored]:
    """Return what is stored by its name in the model: of some models transformers renames parts when it saves them.

    It changes what stands before the blocks, so a tensor is found by its name from the list of blocks on, and where two
    stacks have such a tensor, by what stands before that too; or it changes what a module of a block is called
    (Mixtral's ``block_sparse_moe``), so that name is left out where the whole one is not there.
    """
    found = dict(stored)
    tails: dict[str, list[str]] = {}
    for name in stored:
        for tail in (_tail(name), _in_block(name)):
            tails.setdefault(tail, []).append(name)
    for tensor in tensors:
        same = tails.get(_tail(tensor)) or tails.get(_in_block(tensor)) or []
        alike = sorted(same, key=lambda name: _common_end(name, tensor))
        if tensor not in stored and alike:
            found[tensor] = stored[alike[-1]]
    return found


def _tail(name: str) -> str:
    """Return a name from its list of blocks on: ``layers.0.mlp.up_proj.weight`` of a longer one."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[max(0, first - 1) :])


def _in_block(name: str) -> str:
    """Return what :func:`_tail` does without the name of the module in the block: ``layers.0..up_proj.weight``."""
    parts = _tail(name).split(".")
    return ".".join([*parts[:2], "", *parts[3:]])


def _common_end(one: str, other: str) -> int:
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _is_order(order: torch.Tensor) -> bool:
    """Whether integers name every place exactly once."""
    return not order.is_floating_point() and torch.equal(order.sort().values.long(), torch.arange(len(order)))


def verify(folder: str | Path, trust_remote_code: bool = False, stream: Stream = "auto") -> float:
    """Check a folder: manifest, map, the SHA-256 of every file, and the answers of the model loaded from it.

    Args:
        folder: that pared made.
        trust_remote_code: whether code that lies in it may run.
        stream: whether the model is read block by block; ``auto`` does where memory does not hold it.

    Returns:
        The largest difference from the recorded outputs, relative to the largest output; 0.0 where nothing differs.

    Raises:
        ParedError: anything is missing, damaged or different.
    """
    folder = Path(name_from(folder, "pared.verify"))
    with trusting(trust_remote_code):
        manifest = Manifest.read(folder)
        require_regular_files(folder)
        _require_written(folder)
        weights = require_tensors(folder)
        if streams(stream, weights):
            store = open_whole(folder)
            return compare(store.model, manifest.fingerprint, store)
        return compare(load(str(folder)), manifest.fingerprint)


def open_whole(folder: Path) -> StreamedBlocks:
    """Open a folder to be read block by block; whether its weights are finite is checked as they are read.

    Raises:
        ParedError: not a model, or truncated.
    """
    read_config(str(folder))
    return open_streamed(find_model(str(folder)))


def _require_written(folder: Path) -> None:
    """Check the SHA-256 of every file, before code of the folder could run; say which tensor is wrong if one is."""
    try:
        require_recorded(folder)
    except ParedError:
        if not trusted():
            require_tensors(folder)
        raise


@torch.no_grad()
def _outputs(model: PreTrainedModel, tokens: list[int], store: StreamedBlocks | None) -> torch.Tensor:
    """Return the first output at the last token as float32 on the CPU: logits for a model with a head."""
    if max(tokens) >= model.get_input_embeddings().weight.shape[0]:
        raise ParedError("the fingerprint in pared.json has tokens this model does not know; it is of another model")
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    beside = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    was_training = model.training
    with nullcontext() if store is None else store.running():
        output = model.eval()(input_ids=ids, **beside, **without_cache(model))
    model.train(was_training)
    first = output[0]
    return (first[0, -1] if first.ndim == 3 else first[0]).float().cpu()
