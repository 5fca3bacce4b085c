"""Units whose ranks are decided later: what is read of what was kept of them."""

import torch

from pared import Recipe
from pared.allocation import Unit
from pared.engine.solve import Found, Solver
from pared.engine.spec import resolve_low_rank
from pared.lowrank import METHODS
from pared.structure.model import Site


def test_a_member_of_a_group_reads_no_more_of_the_disk_than_its_own_dense_weight() -> None:
    """Regression: a sequential refit read the weights of a whole group once for every member."""
    weights = [torch.randn(rows, 9, generator=torch.Generator().manual_seed(0)) for rows in (6, 2, 4)]
    model = torch.nn.Module()
    model.a, model.b, model.c = (torch.nn.Linear(9, len(weight), bias=False) for weight in weights)
    for layer, weight in zip((model.a, model.b, model.c), weights, strict=True):
        layer.weight.data = weight
    sites = tuple(Site(name, 0, "", len(weight), 9, False, "a") for name, weight in zip("abc", weights, strict=True))
    recipe = Recipe(method="basis-sharing", keep=0.5)
    unit = Unit(sites)
    with Solver(model, resolve_low_rank(recipe), [unit], keep_dense=True) as solver:
        solver._keep(unit, METHODS["svd"].decompose(torch.cat(weights), {}), {}, found := Found())
        solver.accept(found)
        read = []
        kept = solver.ledger.store.weight
        solver.ledger.store.weight = lambda name, rows: read.append(rows) or kept(name, rows)  # type: ignore[method-assign]
        for site, weight in zip(sites, weights, strict=True):
            assert torch.equal(solver.kept.dense_weight(site.name), weight)
    assert [rows.stop - rows.start for rows in read] == [6, 2, 4]
