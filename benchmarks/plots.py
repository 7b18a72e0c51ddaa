"""The plots of the results, as SVG files that carry a digest of what they show."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import paper
from benchmarks.results import Row, slug

Curves = dict[str, list[list[float]]]  # name -> [size, value], ascending

PAPER_NAMES = {"ours": "paper *: Kimi Linear", "all_mla": "paper *: every layer MLA"}
COLOURS = {"ours": "C0", "all_mla": "C1"}  # the same in every plot
FLOOR_STYLES = {"floor": {"color": "0.5", "linestyle": "--"}}
FLOOR_STYLES |= {"floor_all_mla": {"color": "0.5", "linestyle": ":"}}
FLOOR_STYLES |= {"floor_fp8": {"color": "0.5", "linestyle": "-."}}
PAPER_STYLE = {"linestyle": "--", "linewidth": 0.8, "marker": "x", "markersize": 4}
# of the panel of ratios: name -> whose times are divided by whose
RATIOS = {"measured": ("all_mla", "ours"), "by the floors": ("floor_all_mla", "floor")}
RATIOS |= {"latents in fp8": ("all_mla", "fp8"), "by its floor": ("floor_all_mla", "floor_fp8")}


@dataclass(frozen=True)
class Plot:
    """Time per token of one op against one letter of its shape.

    Attributes:
        name: of the file, in front of the GPU.
        x: the letter, and `x_label` what it is.
        at: the letters that stay fixed, and their sizes.
        tokens: letters whose product is the number of tokens of a call; none: the time is that of
            the whole call, at an open batch of each of its rows.
        unit, per: of the time.
        paper: what the paper has; then a second panel has how much longer every layer MLA takes.
    """

    name: str
    op: str
    mode: str
    x: str
    x_label: str
    at: dict[str, int]
    tokens: str
    title: str
    unit: Literal["ns", "ms"] = "ns"
    per: str = "token"
    paper: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def _model(name: str, mode: str, x: str, title: str, series: paper.Series, **options: Any) -> Plot:
    """Of a whole model, beside the paper's."""
    label = {"S": "tokens of context", "T": "tokens of the prompt"}[x]
    given = {"tokens": "", "unit": "ms", "paper": series} | options
    return Plot(name, "model", mode, x, label, title=title, **given)


ONE = {"B": 1, "L": 8, "E": 256}
PLOTS = (
    Plot("kda_forward", "kda", "forward", "T", "tokens", {"B": 1, "H": 32}, "BT", "KDA, forward"),
    Plot("kda_step", "kda_step", "decode", "B", "sequences", {"H": 32}, "B", "KDA, decode step"),
    _model(
        "model_prefill", "prefill", "T", "prompt, 8 layers", paper.PREFILL, at=ONE, per="prompt"
    ),
    _model("model_decode", "decode_step", "S", "decode, batch 1, 8 layers", paper.DECODE, at=ONE),
    _model(
        "model_decode_27", "decode_step", "S", "decode, batch 1, 27 layers", paper.DECODE,
        at=ONE | {"L": 27},
    ),
    _model(
        "model_throughput", "throughput", "S", "decode at the largest batch, 8 layers",
        paper.LARGEST_BATCH, at={"L": 8, "E": 256},
    ),
)  # fmt: skip


def curves(plot: Plot, rows: Iterable[Row]) -> Curves:
    """What `plot` shows of the rows; empty unless some provider has two points."""
    found: Curves = {}
    for row in rows:
        shape, timed = row["shape"], row["ms_p50"] is not None
        mine = (row["op"], row["mode"]) == (plot.op, plot.mode)
        if mine and timed and plot.at.items() <= shape.items():
            tokens = row["batch"] or 1
            for letter in plot.tokens:
                tokens *= shape[letter]
            time = row["ms_p50"] * (1e6 if plot.unit == "ns" else 1) / tokens
            point = [shape[plot.x], float(f"{time:.4g}")]
            found.setdefault(row["provider"], []).append(point)
    longest = max(map(len, found.values()), default=0)
    names = sorted(found, key=lambda name: (name != "ours", name))
    return {name: sorted(found[name]) for name in names} if longest > 1 else {}


def of_paper(plot: Plot) -> Curves:
    """The paper's points, by the provider that does the same."""
    return {
        name: [[x, y] for x, y in zip(paper.LENGTHS, ys, strict=True)]
        for name, ys in plot.paper.items()
    }


def ratios(plot: Plot, lines: Curves) -> Curves:
    """How many times as long every layer MLA takes: measured, by the floors, in the paper."""

    def ratio(curves: Curves, above: str, below: str) -> list[list[float]]:
        top, bottom = ({x: y for x, y in curves.get(name, [])} for name in (above, below))
        return [[x, top[x] / bottom[x]] for x in sorted(top.keys() & bottom.keys())]

    found = {name: ratio(lines, *pair) for name, pair in RATIOS.items()}
    found["paper *"] = ratio(of_paper(plot), "all_mla", "ours")
    return {name: points for name, points in found.items() if points}


@dataclass(frozen=True)
class Drawing:
    """One file: a plot of one GPU's results."""

    path: Path
    plot: Plot
    gpu: str
    lines: Curves

    @property
    def digest(self) -> str:
        """Of what is drawn and how: a file with the same one need not be drawn again."""
        how = (ratios, draw, _draw_times, _draw_ratios, _scale, short)
        styles = [PAPER_NAMES, COLOURS, FLOOR_STYLES, PAPER_STYLE, RATIOS, paper.SOURCE]
        code = [*map(inspect.getsource, how), *styles]
        content = [repr(self.plot), self.gpu, self.lines, code]
        return "data " + hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def alt(self) -> str:
        """What a reader gets who does not see it."""
        return f"{self.plot.title}, {self.gpu}: time per {self.plot.per}"

    def is_drawn(self) -> bool:
        return self.path.exists() and self.digest in self.path.read_text("utf-8")


def drawings(rows_of: dict[str, list[Row]], folder: Path) -> list[Drawing]:
    """Of every plot and GPU whose rows show something."""
    return [
        Drawing(folder / f"{plot.name}_{slug(gpu)}.svg", plot, gpu, lines)
        for gpu, rows in rows_of.items()
        for plot in PLOTS
        if (lines := curves(plot, rows))
    ]


def short(size: int) -> str:
    """128, 3000, 4k, 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def draw(drawing: Drawing, labels: dict[str, str]) -> None:
    """Write the file, its digest in the metadata. Only this needs matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.figure")
    ticker: Any = importlib.import_module("matplotlib.ticker")
    settings = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}
    two = bool(drawing.plot.paper)
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(figsize=(9.6 if two else 6.4, 3.6), layout="constrained")
        axes = figure.subplots(1, 1 + two, squeeze=False, width_ratios=[5, 4][: 1 + two])[0]
        _draw_times(axes[0], drawing, labels)
        axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_locator(ticker.NullLocator())
        if two:
            _draw_ratios(axes[1], drawing)
            figure.supxlabel(f"* {paper.SOURCE}", fontsize=7)
        drawing.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": drawing.digest}
        figure.savefig(drawing.path, metadata=metadata)


def _draw_times(axes: Any, drawing: Drawing, labels: dict[str, str]) -> None:
    others = iter(f"C{i}" for i in range(2, 10))
    for name, points in drawing.lines.items():
        style = FLOOR_STYLES.get(name)
        style = style or {"color": COLOURS.get(name) or next(others), "marker": "o"}
        axes.plot(*zip(*points, strict=True), label=labels.get(name, name), **style)
    for name, points in of_paper(drawing.plot).items():
        style = PAPER_STYLE | {"color": COLOURS[name]}
        axes.plot(*zip(*points, strict=True), label=PAPER_NAMES[name], **style)
    _scale(axes, drawing)
    plot = drawing.plot
    axes.set_yscale("log")
    axes.set(title=f"{plot.title}, {drawing.gpu}", ylabel=f"{plot.unit} per {plot.per}")


def _draw_ratios(axes: Any, drawing: Drawing) -> None:
    marked = {"color": COLOURS["ours"], "marker": "o"}
    styles = {"measured": marked, "by the floors": FLOOR_STYLES["floor"]}
    styles |= {"latents in fp8": {"color": "C3", "marker": "o"}}
    styles |= {"by its floor": FLOOR_STYLES["floor_fp8"]}
    styles |= {"paper *": marked | PAPER_STYLE}
    for name, points in ratios(drawing.plot, drawing.lines).items():
        axes.plot(*zip(*points, strict=True), label=name, **styles[name])
    _scale(axes, drawing)
    axes.set(title="every layer MLA / Kimi Linear", ylim=(0, None))


def _scale(axes: Any, drawing: Drawing) -> None:
    """The axis of sizes, the grid and the legend."""
    sizes = {x for points in drawing.lines.values() for x, _ in points}
    sizes |= {x for points in of_paper(drawing.plot).values() for x, _ in points}
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), [short(int(x)) for x in sorted(sizes)])
    axes.set(xlabel=drawing.plot.x_label)
    axes.grid(alpha=0.3)
    axes.legend(edgecolor="none", fontsize=8)
