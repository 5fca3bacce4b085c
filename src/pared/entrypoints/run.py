"""A recipe carried out from model name to folder, in one process or several, as often as it is killed."""

from contextlib import nullcontext
from dataclasses import replace

from pared.arguments import asked_from
from pared.checkpoint import verify
from pared.checkpoint.seal import published_recipe
from pared.engine.checks.early import require_job, require_possible
from pared.engine.checks.early import require_model as require_named_model
from pared.entrypoints.compression.compressing import compress_by_name
from pared.entrypoints.compression.result import Outcome, publish
from pared.entrypoints.compression.resume import Resumable, published
from pared.environment import versions
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.leftovers import tidy
from pared.io.run_dir import COMPRESSION, run_folder
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.processes import launched
from pared.progress import Progress, Silent
from pared.schema.manifest import Manifest
from pared.schema.recipe import Recipe


def run(
    recipe: Recipe,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    resume: bool | None = None,
) -> Outcome:
    """Carry out a recipe from model name to folder.

    What can be refused is refused before the first weight is read. The folder is made beside its place, reloaded,
    compared with the model in memory, evaluated, and only then renamed. Every block is kept in a hidden folder beside
    the output as it is finished, which goes when the output is there.

    Where ``torchrun`` or ``accelerate launch`` has started several processes, each calls this with the same arguments:
    they share the windows and the sites, and the first writes and measures. A run that was killed resumes with any
    number of them.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the model's weights may run.
        resume: True resumes from the last block that a killed run of the very same recipe, model, data and versions
            finished, to the same bytes; False removes what it finished, and starts over. None, the default, is refused
            where there is any.

    Raises:
        ParedError: anything wrong; nothing was written or overwritten, and what is finished is kept.
    """
    with trusting(trust_remote_code):
        asked, watcher = asked_from(Recipe, recipe, "pared.run"), watcher_of(progress, "pared.run")
        with launched(asked.device) as processes:
            watcher = watcher if processes.is_first else Silent()
            again = bool(resume) and not overwrite
            if resume is not False and (there := processes.first(lambda: _there(asked, again, watcher))) is not None:
                return replace(there, is_first=processes.is_first)
            spec, source, out = require_job(asked, overwrite, bool(resume))
            state = Resumable.beside(out, resume, watcher) if processes.is_first else nullcontext()
            with state as resumable:
                result = compress_by_name(source, spec, watcher, out, resumable=resumable, processes=processes)
                saver, streamed, result.streamed = result.saver(last=True), result.streamed, None
                del result.model  # there may be room for only one of it and what is reloaded
                with nullcontext() if streamed is None else streamed.handed_over():
                    sealed = None if resumable is None else resumable.publishing
                    outcome = processes.first(lambda: publish(result, saver, out, overwrite, watcher, sealed))
            return replace(outcome, is_first=processes.is_first)


def _there(recipe: Recipe, again: bool, progress: Progress) -> Outcome | None:
    """Return the outcome of a run that was killed after its output took its place; its state is removed.

    Args:
        recipe: of the run.
        again: return that of a run which has ended, too, as of a job that starts itself again until it is done.
        progress: is told so.
    """
    out, spec = path_of(recipe.out or ""), require_possible(recipe)
    if recipe.out is None:
        return None
    if published(spec, lambda: require_named_model(spec), out):
        tidy(out)  # it may have been killed when it was about to remove its state
        return Outcome(out, Manifest.read(out))
    if not again or run_folder(out, COMPRESSION).is_dir():
        return None
    tidy(out)  # or while it did
    found = reusable(recipe)
    if found is not None:
        progress.note(f"{out} is finished, by this very recipe: nothing was left to do")
    return found


def reusable(recipe: Recipe) -> Outcome | None:
    """Return the outcome in a recipe's output folder if it is whole, and was made by this very recipe and versions.

    The files that the recipe names have to hold what they held then. What a name of the Hub stands for is not compared.
    """
    folder = path_of(recipe.out or "")
    try:
        manifest = Manifest.read(folder)
        if (manifest.recipe, manifest.inputs) != published_recipe(recipe) or manifest.versions != versions():
            return None
        verify(folder)
    except (ParedError, OSError):
        return None
    return Outcome(folder, manifest)
