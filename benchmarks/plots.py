"""The plots of the results, as SVG files that carry a digest of what they show."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import Row, slug

Curves = dict[str, list[list[float]]]  # provider -> [size, time per token], ascending


@dataclass(frozen=True)
class Plot:
    """Time per token of one op against one letter of its shape.

    Attributes:
        name: of the file, in front of the GPU.
        x: the letter, and `x_label` what it is.
        at: the letters that stay fixed, and their sizes.
        tokens: letters whose product is the number of tokens of a call.
        unit: of the time.
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


PLOTS = (
    Plot("kda_forward", "kda", "forward", "T", "tokens", {"B": 1, "H": 32}, "BT", "KDA, forward"),
    Plot("kda_step", "kda_step", "decode", "B", "sequences", {"H": 32}, "B", "KDA, decode step"),
    Plot(
        "model_decode",
        "model",
        "decode_step",
        "S",
        "tokens of context",
        {"B": 1, "L": 8},
        "B",
        "decode step of 8 layers",
        "ms",
    ),
)


def curves(plot: Plot, rows: Iterable[Row]) -> Curves:
    """What `plot` shows of the rows; empty unless some provider has two points."""
    found: Curves = {}
    for row in rows:
        shape, timed = row["shape"], row["ms_p50"] is not None
        mine = (row["op"], row["mode"]) == (plot.op, plot.mode)
        if mine and timed and plot.at.items() <= shape.items():
            tokens = 1
            for letter in plot.tokens:
                tokens *= shape[letter]
            time = row["ms_p50"] * (1e6 if plot.unit == "ns" else 1) / tokens
            point = [shape[plot.x], float(f"{time:.4g}")]
            found.setdefault(row["provider"], []).append(point)
    longest = max(map(len, found.values()), default=0)
    # ours first: it has the same colour in every plot
    names = sorted(found, key=lambda name: (name != "ours", name))
    return {name: sorted(found[name]) for name in names} if longest > 1 else {}


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
        content = [repr(self.plot), self.gpu, self.lines, inspect.getsource(draw)]
        return "data " + hashlib.sha256(json.dumps(content).encode()).hexdigest()

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


def draw(drawing: Drawing, labels: dict[str, str]) -> None:
    """Write the file, its digest in the metadata. Only this needs matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.figure")
    ticker: Any = importlib.import_module("matplotlib.ticker")
    settings = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for provider, points in drawing.lines.items():
            style = {"color": "0.5", "linestyle": "--"} if provider == "floor" else {"marker": "o"}
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, label=labels.get(provider, provider), **style)
        sizes = sorted({x for points in drawing.lines.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        title = f"{drawing.plot.title}, {drawing.gpu}"
        axes.set(title=title, xlabel=drawing.plot.x_label, ylabel=f"{drawing.plot.unit} per token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        drawing.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": drawing.digest}
        figure.savefig(drawing.path, metadata=metadata)
