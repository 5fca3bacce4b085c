"""A loaded model, compressed where it stands: the engine's work with what only an entry point knows."""

from collections.abc import Callable, Iterator

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import require_tokenizer
from pared.calibration import BlockStatistics
from pared.calibration.spool import ActivationMemory
from pared.checkpoint import mark, module_map
from pared.checkpoint.streamed import StreamedBlocks
from pared.data.windows import Windows
from pared.engine.checks.early import require_possible, require_suited
from pared.engine.compress import compress_blocks
from pared.engine.result import CompressedBlocks
from pared.engine.spec import CompressionSpec
from pared.engine.state.run_state import CompressionRun
from pared.engine.targets.opening import close_unchanged
from pared.environment import device_of
from pared.errors import ParedError
from pared.evaluation.perplexity import perplexity
from pared.modules.opened import experts_map
from pared.processes import ALONE, Processes
from pared.progress import Progress
from pared.schema.presets import require_user_fields
from pared.schema.recipe import Recipe

Collected = Callable[[], Iterator[BlockStatistics]]


def require_compressible(
    model: PreTrainedModel, tokenizer: object, recipe: Recipe, windows: Windows | None
) -> CompressionSpec:
    """Resolve a recipe, and refuse what cannot be done to a loaded model.

    Args:
        model: that is to be changed.
        tokenizer: of it; none will do where no text is read.
        recipe: what is to be done.
        windows: calibration tokens already cut; none where the recipe's text is read.

    Raises:
        ParedError: whatever does not go with the recipe or the model; nothing is changed.
    """
    spec = require_possible(recipe)  # what can be refused is refused first
    if windows is None:
        require_user_fields(recipe)
    name = model.config.name_or_path or type(model).__name__
    if hasattr(model, "peft_config"):
        raise ParedError(f"model {name!r} carries PEFT adapters; merge them first (merge_and_unload)")
    if module_map(model):
        raise ParedError(f"model {name!r} is compressed already, at least in part; load the dense model again")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ParedError(
            f"model {name!r} is in shards (FSDP, tensor parallel), and blocks are changed whole; save it, and compress "
            "its folder: that is read block by block, by one process or several"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ParedError(f"model {name!r} was loaded under torch.inference_mode(); load it outside of it")
    require_suited(model.config, spec, name)
    device_of(recipe.device)
    if spec.tries or (windows is None and spec.calibrated):
        require_tokenizer(tokenizer, "pared.compress")
    return spec


def where_it_is(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """Return a recipe of a loaded model, which stays where it is unless a device is named."""
    if recipe.device != "auto" or model.device.type == "meta":
        return recipe
    return recipe.model_copy(update={"device": str(model.device)})


def compress_in_place(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: CompressionSpec,
    progress: Progress,
    windows: Windows | None,
    saved: Collected | None,
    *,
    state: CompressionRun | None = None,
    store: StreamedBlocks | None = None,
    memory: ActivationMemory | None = None,
    processes: Processes = ALONE,
) -> CompressedBlocks:
    """Compress a model, and have its configuration say what became of it, whatever happens.

    Args:
        model: dense; changed block by block.
        tokenizer: of it; none will do where no text is read.
        spec: of the recipe.
        progress: what reports progress.
        windows: calibration tokens already cut, in place of the recipe's text.
        saved: statistics of these tokens, in place of a pass over them.
        state: keeps what is finished, for a process that resumes with it.
        store: of the model, where its blocks are not in memory.
        memory: what hidden states share.
        processes: that compress together.

    Raises:
        ParedError: anything in the model or the text that does not work; says whether blocks are compressed already.
    """

    def trial(on: Windows) -> float:
        assert tokenizer is not None
        return perplexity(model, tokenizer, on, store=store, memory=memory).value

    try:
        return compress_blocks(
            model,
            tokenizer,
            spec,
            windows=windows,
            saved=saved,
            trial=trial,
            store=store,
            memory=memory,
            state=state,
            processes=processes,
            progress=progress,
        )
    except ParedError as error:
        if module_map(model) and state is None and store is None:
            raise ParedError(f"{error}; the blocks before it are compressed already: load the model again") from error
        raise
    finally:
        if store is None:
            close_unchanged(model)
        if module_map(model) or experts_map(model):
            mark(model)  # also after Ctrl-C: what is saved then must load again
