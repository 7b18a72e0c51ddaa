"""The results, one JSON line per training run, and what the README shows of them."""

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row, read, slug

FOLDER = Path(__file__).resolve().parent
KEY = ("task", "mixer", "length", "lr", "seed", "gpu")
COLUMNS = (
    *KEY[:5],
    *("max_steps", "tokens", "steps", "seconds", "accuracy", "exact", "curve", "stop"),
    *("gpu", "torch", "git", "date"),
)
BLOCK = re.compile(r"(<!-- synthetic -->\n).*?(<!-- /synthetic -->)", re.DOTALL)
NAMES = {"kda": "KDA", "scalar": "KDA, one gate per head", "softmax": "softmax attention"}
LENGTHS, SHOWN = (256, 512, 1024, 2048), 1024
REACHED, MISSING = 0.99, "-"
# arXiv 2510.26692, figure 4: % at each of LENGTHS; steps to REACHED at SHOWN, read every 2,000
PAPER: dict[str, dict[str, tuple[tuple[float, ...], int | None]]] = {
    "palindrome": {
        "KDA": ((100, 100, 100, 42.2), 10_000),
        "GDN": ((100, 100, 97.0, 37.1), 18_000),
        "Mamba2": ((100, 0, 0, 0), None),
    },
    "mqar": {
        "KDA": ((100, 100, 100, 47.6), 6_000),
        "GDN": ((100, 100, 78.7, 29.1), None),
        "Mamba2": ((97.6, 0, 0, 0), None),
    },
    "stack": {
        "KDA": ((100, 100, 100, 100), 6_000),
        "GDN": ((100, 100, 100, 100), 8_000),
        "Mamba2": ((100, 100, 0, 0), None),
    },
}


def replace(path: Path, row: Row) -> bool:
    """Write `row` in place of the one with the same key; not one that a budget has cut short in
    place of one that ran to its end, and then return False.

    Raises:
        ValueError: the row does not have exactly the columns.
    """
    if set(row) != set(COLUMNS):
        raise ValueError(f"row has the columns {sorted(row)}, want {sorted(COLUMNS)}")
    rows = {tuple(r[column] for column in KEY): r for r in read(path)}
    key = tuple(row[column] for column in KEY)
    if row["stop"] == "budget" and key in rows and rows[key]["stop"] != "budget":
        return False
    rows[key] = {column: row[column] for column in COLUMNS}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)), "utf-8")
    new.replace(path)
    return True


def best(rows: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
    """(task, mixer, length) -> its run of the highest accuracy, over learning rates and seeds."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: (row["accuracy"], row["exact"], -row["steps"])):
        found[row["task"], row["mixer"], row["length"]] = row
    return found


def percent(x: float) -> str:
    """Of a fraction, one digit behind the point; 100 only if nothing is wrong."""
    return "100" if x == 1 else f"{min(100 * x, 99.9):.1f}"


def cell(row: Row | None) -> str:
    """`99.9 (95.7)`: answers and whole sequences; a star where the budget ended the run."""
    if row is None:
        return MISSING
    star = "\\*" if row["stop"] == "budget" else ""
    return f"{percent(row['accuracy'])} ({percent(row['exact'])}){star}"


def steps_to(row: Row | None) -> str:
    """The first evaluation that reached it."""
    steps = [step for step, accuracy in row["curve"] if accuracy >= REACHED] if row else []
    return f"{steps[0]:,}" if steps else MISSING


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: of each task our mixers, then the paper's."""
    runs = best(rows)
    lengths = sorted({*LENGTHS, *(length for _, _, length in runs)})
    head = ["task", "model", *map(str, lengths), f"steps to {REACHED:.0%} at {SHOWN}"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for task, of_paper in PAPER.items():
        for mixer, name in NAMES.items():
            mine = {length: runs.get((task, mixer, length)) for length in lengths}
            if any(mine.values()):
                cells = [cell(mine[length]) for length in lengths]
                lines.append([task, name, *cells, steps_to(mine[SHOWN])])
        for name, (values, steps) in of_paper.items():
            at = dict(zip(LENGTHS, values, strict=True))
            cells = [f"{at[length]:g}" if length in at else MISSING for length in lengths]
            lines.append([task, f"paper: {name}", *cells, f"{steps:,}" if steps else MISSING])
    return [f"| {' | '.join(line)} |" for line in lines]


def section(gpu: str, rows: Sequence[Row], image: str) -> str:
    """What stands between the markers, for one GPU."""
    shown = best(rows).values()
    versions = " and ".join(sorted({row["torch"] for row in shown}))
    commits = ", ".join(sorted({row["git"] for row in shown if row["git"]}))
    dates = " to ".join(sorted({f([row["date"] for row in shown]) for f in (min, max)}))
    rates = ", ".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows}))
    seconds = sum(row["seconds"] for row in rows)
    lines = [
        "",
        "Accuracy in % of the answers (in brackets: of sequences without a wrong one):",
        "",
        *table(rows),
        "",
        f"On {gpu}, {seconds:,.0f} s of training in all; the best of learning rates {rates}. "
        + f"torch {versions}; {dates}{f' at {commits}' if commits else ''}.",
    ]
    if any(row["stop"] == "budget" for row in shown):
        lines.append("\\* ended by the time budget, before it was solved and before its last step.")
    return "\n".join([*lines, "", f"![accuracy against length]({image})", "", ""])


def draw(path: Path, gpu: str, rows: Sequence[Row]) -> None:
    """A panel per task: accuracy against length, the paper's dashed. Only this needs matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.figure")
    settings = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}
    runs = best(rows)
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(figsize=(8.4, 3.2), layout="constrained")
        panels = figure.subplots(1, len(PAPER), sharey=True)
        for axes, (task, of_paper) in zip(panels, PAPER.items(), strict=True):
            for i, (mixer, name) in enumerate(NAMES.items()):
                points = sorted((key[2], r["accuracy"]) for key, r in runs.items()
                                if key[:2] == (task, mixer))  # fmt: skip
                xs, ys = [x for x, _ in points], [100 * y for _, y in points]
                axes.plot(xs, ys, marker="o", color=f"C{i}", label=name)
            for i, name in enumerate(("KDA", "GDN")):
                style = {"linestyle": "--", "marker": "x", "color": f"C{i}", "alpha": 0.6}
                axes.plot(LENGTHS, of_paper[name][0], label=f"paper: {name}", **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(LENGTHS, list(map(str, LENGTHS)))
            axes.set(title=task, xlabel="tokens", ylim=(-4, 104))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"accuracy, %, {gpu}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the README's block and the plots from `results/*.jsonl`; returns what was written."""
    rows = [row for file in sorted((folder / "results").glob("*.jsonl")) for row in read(file)]
    readme, images, sections = folder / "README.md", [], ""
    for gpu in sorted({row["gpu"] for row in rows}):
        mine = [row for row in rows if row["gpu"] == gpu]
        images.append(folder / f"accuracy_{slug(gpu)}.svg")
        draw(images[-1], gpu, mine)
        sections += section(gpu, mine, images[-1].name)
    text = readme.read_text("utf-8")
    readme.write_text(BLOCK.sub(lambda found: found[1] + sections + found[2], text), "utf-8")
    return [readme, *images]
