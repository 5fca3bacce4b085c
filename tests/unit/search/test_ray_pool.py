"""A local Ray cluster of two workers, one of them killed: the same journal as one process writes."""

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS

from pared import ParedError, Recipe
from pared.entrypoints.search import search
from pared.search.evolution import Candidate, Measured
from unit.entrypoints.test_search import CONFIG, PROGRAM

MISSING = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(MISSING, reason="ray is not installed (pip install ray)")


class Mortal:
    """Kills the worker of candidate 1, the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, candidate: Candidate) -> Measured:
        if candidate.number == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Measured((float(candidate.number),))

    def final(self, candidate: Candidate) -> Measured:
        raise ParedError(f"on purpose {candidate.number}")


@pytest.fixture
def recipe(text_file: Path) -> Recipe:
    calibration = {"text": f"file:{text_file}", "samples": 5, "length": 16, "batch": 2, "dtype": "float32"}
    return Recipe.of({"method": "wanda", "sparsity": 0.6, "calibration": calibration})


@needs_ray
def test_a_ray_worker_that_dies_costs_only_its_candidate_and_the_journal_is_the_same(
    recipe: Recipe, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from pared.search.ray_pool import RayPool, on_ray

    tests = Path(__file__).parents[2]
    folders = [str(tests), str(tests / "unit"), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RayPool(Mortal(tmp_path), 2, "auto") as pool:
            first = ray.get([actor.pid.remote() for actor in pool.actors])
            for number in range(5):
                pool.submit(Candidate(number, PROGRAM, ()))
            assert dict(pool.next() for _ in range(5)) == {number: Measured((float(number),)) for number in range(5)}
            assert (tmp_path / "killed").exists()
            assert len(set(first) & set(ray.get([actor.pid.remote() for actor in pool.actors]))) == 1
            pool.submit(Candidate(7, PROGRAM, ()), final=True)
            with pytest.raises(ParedError, match="on purpose 7"):
                pool.next()
        model, config = TINY_MODELS["llama"](), CONFIG.model_copy(update={"workers": 2})
        search(model, tokenizer, recipe, config, tmp_path / "ray", pools=on_ray("auto"))
    finally:
        ray.shutdown()
    search(model, tokenizer, recipe, config, tmp_path / "here")
    assert (tmp_path / "ray" / "journal.jsonl").read_bytes() == (tmp_path / "here" / "journal.jsonl").read_bytes()


@pytest.mark.skipif(not MISSING, reason="ray is installed")
def test_without_ray_the_line_that_installs_it_is_told() -> None:
    from pared.search.ray_pool import on_ray

    with pytest.raises(ParedError, match="pip install ray,"):
        on_ray("auto")
