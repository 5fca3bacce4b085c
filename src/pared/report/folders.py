"""What a page shows of folders that pared made: quality against size, what stays where, how it came about."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from pared.memory import format_size
from pared.report.curves import SIZES, draw
from pared.report.page import Bar, Bars, Block, Cell, Map, MapRow, Picture, Section, comparison_sections, page
from pared.report.plots import COLOURS, few_round_ticks, inline, new_figure, require_plotting
from pared.report.results import too_few_line
from pared.schema.command_line import as_words
from pared.schema.compare import ComparedModel, ComparedModels
from pared.schema.explore import Exploration
from pared.schema.manifest import Manifest
from pared.schema.plan import Dense, LowRank, Plan, Shared, SitePlan
from pared.schema.width import Width
from pared.tables import Table


def report_page(
    manifests: Mapping[str, Manifest], compared: ComparedModels, explorations: Sequence[Exploration], command: str
) -> str:
    """Return the page.

    Args:
        manifests: of the folders, by what the page calls them.
        compared: the same folders side by side, and what they were made of.
        explorations: whose predictions are shown beside what was measured.
        command: that makes the page again.

    Raises:
        ParedError: matplotlib is not installed.
    """
    require_plotting("a report")
    sections = [*comparison_sections(compared)]
    quality = [] if (one := _quality(compared.models)) is None else [one]
    sections[1:1] = [*quality, _sizes(manifests), _maps(manifests), *_predicted(explorations), *_speed(compared.models)]
    sections += [_provenance(manifests, command)]
    names = ", ".join(manifests)
    versions = sorted({manifest.versions["pared"] for manifest in manifests.values()})
    return page(f"Report on {names}", f"Made by pared {', '.join(versions)}; one file, no network needed.", sections)


def _quality(models: Sequence[ComparedModel]) -> Section | None:
    """Return perplexity over size, of models whose dense model was measured too."""
    known = [(one, one.perplexity / one.perplexity_before) for one in models
             if one.perplexity is not None and one.perplexity_before]  # fmt: skip
    if not known:
        return None
    pictures = []
    for name, (label, size) in SIZES.items():
        figure, (panel,) = new_figure(5.4, 3.6)
        for place, (one, ratio) in enumerate(known):
            panel.plot([size(one)], [ratio], "o", color=COLOURS[place % len(COLOURS)], label=one.name)
        panel.axhline(1, color="#808080", linestyle=":", label="dense")
        panel.set(xlabel=label, ylabel="perplexity / dense")
        few_round_ticks(panel.xaxis)
        panel.margins(0.15)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="best")
        told = "; ".join(f"{one.name}: {size(one):,.0f}, x{ratio:.3g}" for one, ratio in known)
        pictures.append(Picture(inline(figure, f"quality-{name}", f"Perplexity over {label}. {told}"),
                                f"Perplexity as a multiple of the dense model's, over {label}."))  # fmt: skip
    return Section("quality", "Quality against size", figures=pictures)


def _sizes(manifests: Mapping[str, Manifest]) -> Section:
    """Return the three sizes of every folder beside those of its dense model."""

    def bars(title: str, before_and_after: Mapping[str, tuple[int, int, str]]) -> Bars:
        return Bars(
            title, [Bar(name, told, after / before) for name, (before, after, told) in before_and_after.items()]
        )

    target, whole, disk = {}, {}, {}
    for name, one in manifests.items():
        before, after = one.plan.before, one.plan.after
        target[name] = before.covered_parameters, after.covered_parameters, f"{after.covered_parameters:,}"
        whole[name] = before.model_parameters, after.model_parameters, f"{after.model_parameters:,}"
        on_disk = one.bytes_on_disk or after.bytes_on_disk
        disk[name] = one.bytes_before or before.bytes_on_disk, on_disk, format_size(on_disk)
    shown = [bars("Target parameters", target), bars("Whole-model parameters", whole), bars("Weights on disk", disk)]
    return Section("sizes", "Sizes three ways", bars=shown)


def _maps(manifests: Mapping[str, Manifest]) -> Section:
    """Return what stays of every layer."""
    text = ["Per cent of a layer's parameters that stay, darker for more; ranks, widths or sparsities are told on "
            "hovering, and below each number."]  # fmt: skip
    return Section("maps", "What stays, block by block", text, maps=[_map(n, one.plan) for n, one in manifests.items()])


def _map(name: str, plan: Plan) -> Map:
    kinds = list(dict.fromkeys(site.kind for site in plan.sites))
    blocks: dict[int, dict[str, SitePlan]] = {}
    for site in plan.sites:
        blocks.setdefault(site.block, {}).setdefault(site.kind, site)
    rows = [MapRow(str(block), [_cell(own.get(kind)) for kind in kinds]) for block, own in sorted(blocks.items())]
    return Map(name, f"{name}: per cent that stays, and what was decided", kinds, rows)


def _cell(site: SitePlan | None) -> Cell | None:
    if site is None:
        return None
    share, decision = site.after / site.before, site.decision
    if isinstance(decision, (LowRank, Shared)):
        short = f"r{decision.rank}"
    elif isinstance(decision, Width):
        short = f"w{decision.width}" + (f" r{decision.rank}" if decision.rank is not None else "")
    else:
        short = "dense" if isinstance(decision, Dense) else f"{1 - share:.0%} zero"
    return Cell(min(share, 1.0), f"{share:.0%} {short}", f"{site.name}: {site.describe()}")


def _predicted(explorations: Sequence[Exploration]) -> Iterator[Section]:
    """Yield what was predicted beside what was measured, if anything was explored."""
    pictures = []
    for place, one in enumerate(explorations):
        for over in ("parameters", "bytes"):
            told = "; ".join(f"{point.structure} at {point.keep:g}: predicted {point.loss:.3f}"
                             + (f", measured {loss:.3f}" if (loss := one.measured_loss(point)) is not None else "")
                             for point in one.points)  # fmt: skip
            figure = draw(one, over=(over,))
            pictures.append(Picture(inline(figure, f"explored-{place}-{over}", f"Added loss over {over}. {told}"),
                                    f"{one.model}: loss added over {over}; lines are predicted, markers measured, a "
                                    "ring marks the knee."))  # fmt: skip
    if pictures:
        tables = [one.table() for one in explorations]
        yield Section("predicted", "Predicted against measured loss", figures=pictures, tables=tables)


def _speed(models: Sequence[ComparedModel]) -> Iterator[Section]:
    """Yield how many times as fast models were measured to be as what they were timed against, and would be ideally."""
    rows = [(one.name, case, f"x{measured:.2f}", f"x{ideal:.2f}", f"{measured / ideal:.0%}")
            for one in models for case, (measured, ideal) in one.faster.items()]  # fmt: skip
    if rows:
        yield Section("speed", "Speed against ideal", tables=[
            Table("", ("model", "case", "times as fast", "ideal", "of the ideal"), rows, align="llr")
        ])  # fmt: skip


def _provenance(manifests: Mapping[str, Manifest], command: str) -> Section:
    """Return how every folder came about, and the commands that make it again."""
    blocks = [Block(name, list(_protocol(one)), _commands(one)) for name, one in manifests.items()]
    return Section("provenance", "Protocol and provenance", blocks=[*blocks, Block("This page", code=command)])


def _commands(manifest: Manifest) -> str:
    lines = [shlex.join(["pared", "compress", *as_words(manifest.recipe)])]
    lines += [shlex.join(["pared", "tune", *as_words(training.tuning)]) for training in manifest.training]
    return "\n".join(lines)


def _protocol(manifest: Manifest) -> Iterator[str]:
    yield f"Made from {manifest.model['name']} ({manifest.model['origin']}, {manifest.model['architecture']})."
    for what, on in (("Calibrated", manifest.calibration), ("Measured", manifest.evaluation)):
        if on is not None:
            yield (f"{what} on {on['windows']} windows of {on['length']} tokens of {on['text']} ({on['origin']}), "
                   f"digest {on['digest'][:16]}.")  # fmt: skip
    if manifest.settled:
        yield "auto stood for: " + ", ".join(f"{name} {value}" for name, value in manifest.settled.items()) + "."
    if manifest.too_few:
        yield too_few_line(manifest.too_few)
    seconds = sum(manifest.seconds.values())
    yield f"{seconds:,.0f} seconds, peak memory {format_size(manifest.peak_memory_bytes)}."
    yield f"Self-check: reloaded, largest relative difference {manifest.self_check:.2g}."
    yield "Versions: " + ", ".join(f"{name} {value}" for name, value in manifest.versions.items()) + "."
    yield "Machine: " + ", ".join(f"{name} {value}" for name, value in manifest.machine.items()) + "."
