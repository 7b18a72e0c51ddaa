"""Write the tables of the README from the results, and draw the plots.

    python -m benchmarks.report            write
    python -m benchmarks.report --check    exit with 1 if that would change anything

The table of an op stands between `<!-- bench:OP -->` and `<!-- /bench:OP -->`: that of the GPU with
the most results, then those of others, folded.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks import context, memory
from benchmarks.capacity import MOST_ROWS
from benchmarks.inputs import DOCUMENTS
from benchmarks.op import FLOORS
from benchmarks.ops import OPS
from benchmarks.plots import Drawing, draw, drawings
from benchmarks.results import COLUMNS, ROOT, Row, label, per_token, read

BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
MODES = {"forward": "forward", "train": "forward + backward", "decode": "decode step"}
MODES |= {"cold": "first call, nothing compiled"}
MODES |= {"cold_train": "first forward + backward, nothing compiled"}
MODES |= {"train_step": "forward, loss, backward", "prefill": "prompt"}
MODES |= {"decode_step": "decode step", "generate": "`generate`, all T tokens"}
MODES |= {"optimizer_step": "optimizer step, 8 packed documents"}
MODES |= {"packed": f"forward, {DOCUMENTS} documents of new lengths"}
MODES |= {"packed_train": f"forward + backward, {DOCUMENTS} documents of new lengths"}
MODES |= {"error": "gates as a model starts", "error_strong": "strong gates"}
MODES |= {"even": "latents of even size", "outliers": "outliers, sharp scores", "logits": "logits"}
UNITS = {"kda_gradients": "relative RMS error of dA_log"}
UNITS |= {"mla_fp8": "relative RMS error of o", "model_fp8": "relative RMS error of the logits"}
PROVIDERS = {"fla_bounded": "fla, bounded gate", "flash_kda": "FlashKDA, bounded gate"}
PROVIDERS |= {"fla_recurrence": "fla, recurrence alone", "native": "transformers + fla"}
PROVIDERS |= {"autocast": "ours, `bf16=True`", "bare": "bare loop"}
PROVIDERS |= {"all_mla": "ours, every layer MLA", "floor_all_mla": "floor, every layer MLA"}
PROVIDERS |= {"fp8": "ours, latents in fp8", "floor_fp8": "floor, latents in fp8"}
PROVIDERS |= {"flash_attn": "ours, flash-attn-4", "sdpa": "SDPA"}
PROVIDERS |= {name: f"transformers, {name}" for name in ("grouped_mm", "batched_mm")}
# ours is compared with the first of them that is there
BASELINES = ("fla", "native", "grouped_mm", "torch", "bare", "sdpa")
LARGEST = (
    f"Decode steps at the largest batch that fits into the GPU's memory, at most {MOST_ROWS:,} "
    "sequences; the floor is that of the batch:"
)
MISSING = "-"
TABLES = {"context": context.tables, "memory": memory.tables}  # of files of their own
T = TypeVar("T", str, tuple)


def digits(x: float, n: int = 3) -> str:
    """`n` significant digits, never fewer before the point: 2.1e-06, 0.0144, 1.26, 233, 12,345."""
    if x < 1e-4:
        return f"{x:.1e}"
    return f"{x:,.{max(0, n - 1 - math.floor(math.log10(x)))}f}"


def in_order(found: Iterable[T], order: Iterable[T]) -> list[T]:
    """`found` without repeats: first as in `order`, then the others, sorted."""
    position = {x: i for i, x in reversed(list(enumerate(order)))}
    return sorted(set(found), key=lambda x: (position.get(x, len(position)), x))


def provider_order(op: str) -> list[str]:
    return [*(name for o in OPS if o.name == op for name in o.providers), *FLOORS]


def letter_sizes(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The letters that `label` does not show, each with its sizes."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        for letter, size in row["shape"].items():
            if letter not in "BTHSN":
                sizes.setdefault(letter, set()).add(size)
    return {letter: sorted(found) for letter, found in sizes.items()}


def constants(rows: Sequence[Row]) -> str:
    """Those that have one size: `K 128, V 128`. The others have a column."""
    return ", ".join(f"{letter} {s[0]}" for letter, s in letter_sizes(rows).items() if len(s) == 1)


def cells(ms: dict[str, float], names: Sequence[str], baseline: str | None) -> list[str]:
    """Of one row: the times in ms, and ours as a fraction of the baseline's if there is one."""
    times = [digits(ms[name]) if name in ms else MISSING for name in names]
    if baseline is None:
        return times
    if not {"ours", baseline} <= set(ms):
        return [*times, MISSING]
    ratio = ms["ours"] / ms[baseline]
    return [*times, f"{ratio:.2f}" if ratio >= 0.01 else digits(ratio, 1)]


def table(op: str, rows: Sequence[Row]) -> list[str]:
    """Markdown lines: a row per mode and shape, a column per provider; times, or errors."""
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        line = times.setdefault((row["mode"], *sorted(row["shape"].items())), {})
        line[row["provider"]] = row["ms_p50"] if row["error"] is None else row["error"]
    listed = [(o.mode, *sorted(s.items())) for o in OPS if o.name == op for s in o.shapes]
    names = in_order((row["provider"] for row in rows), provider_order(op))
    baseline = next((n for n in BASELINES if {"ours", n} <= set(names)), None)
    shown = {letter for row in rows for letter in row["shape"]}
    letters = " x ".join(letter for letter in "BTH" if letter in shown)
    letters += " after S" if "S" in shown else ""
    varied = [letter for letter, sizes in letter_sizes(rows).items() if len(sizes) > 1]
    start = ["mode", *varied, letters]
    head = [*start, *(PROVIDERS.get(name, name) for name in names)]
    head += [f"ours / {baseline}"] if baseline else []
    lines = [head, [*["---"] * len(start), *["---:"] * (len(head) - len(start))]]
    for key in in_order(times, listed):
        mode, shape = key[0], dict(key[1:])
        start = [MODES.get(mode, mode), *(str(shape.get(x, MISSING)) for x in varied), label(shape)]
        lines.append([*start, *cells(times[key], names, baseline)])
    return [f"| {' | '.join(line)} |" for line in lines]


def largest(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: of each context who decodes after it, at batches of their own."""
    at: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in rows:
        at.setdefault(tuple(row["shape"][x] for x in "LES"), {})[row["provider"]] = row
    floor_of = {whose: name for name, whose in FLOORS.items()}
    head = ["L", "E", "after S", "model", "GB per sequence", "batch", "ms per step", "ms per token"]
    head += ["its floor", "tokens per s", "every layer MLA / this", "by the floors"]
    lines = [head, [*["---"] * 4, *["---:"] * (len(head) - 4)]]
    for sizes, found in sorted(at.items()):
        ms = {name: per_token(row) for name, row in found.items()}
        for name in in_order(found.keys() - FLOORS.keys(), provider_order("model")):
            row, floor = found[name], floor_of.get(name, MISSING)
            line = [*map(str, sizes), PROVIDERS.get(name, name), digits(row["cache_mb"] / 1e3)]
            line += [f"{row['batch']:,}", digits(row["ms_p50"]), digits(ms[name])]
            line += [digits(ms[floor]) if floor in ms else MISSING, digits(1e3 / ms[name])]
            for pair in (("all_mla", name), (floor_of["all_mla"], floor)):
                known = set(pair) <= ms.keys()
                line.append(digits(ms[pair[0]] / ms[pair[1]]) if known else MISSING)
            lines.append(line)
    return [f"| {' | '.join(line)} |" for line in lines]


def provenance(rows: Sequence[Row], every_row: Sequence[Row]) -> str:
    """With what, when and at which commit the rows were measured, and what the GPU can do."""
    rates = {row["op"]: row for row in every_row if row["op"] in ("copy", "matmul")}
    parts = []
    if "copy" in rates:
        parts.append(f"Copy {digits(rates['copy']['gbps'] / 1e3)} TB/s")
    if "matmul" in rates:
        parts.append(f"matrix product {digits(rates['matmul']['tflops'])} TFLOP/s")
    for package in ("torch", "triton"):
        parts += [f"{package} {v}" for v in sorted({r[package] for r in rows if r[package]})]
    parts += sorted({r["provider_version"] for r in rows if r["provider_version"]})
    dates, commits = ({r[column] for r in rows if r[column]} for column in ("date", "git"))
    when = " to ".join(sorted({min(dates), max(dates)}))
    at = f" at {', '.join(sorted(commits))}" if commits else ""
    return f"{', '.join(parts)}; measured {when}{at}."


def peak_memory(rows: Sequence[Row]) -> str:
    """What training needs above its inputs, in front of another sentence."""
    peaks: dict[str, list[str]] = {}
    for row in rows:
        if row["mode"] in ("train", "train_step", "optimizer_step") and row["peak_mb"]:
            name = PROVIDERS.get(row["provider"], row["provider"])
            peak = f"{name} {digits(row['peak_mb'] / 1e3)}"
            peaks.setdefault(label(row["shape"]), []).append(peak)
    text = "; ".join(f"{shape}: {', '.join(found)}" for shape, found in peaks.items())
    return f"Peak memory of training above the inputs, GB: {text}. " if text else ""


def section(op: str, rows: Sequence[Row], images: Sequence[Drawing], root: Path) -> str:
    """What stands between the markers of an op, for one GPU."""
    mine = [row for row in rows if row["op"] == op]
    alone = [row for row in mine if not row["batch"]]
    gpu, dtype = mine[0]["gpu"], mine[0]["dtype"]
    sizes = constants(alone or mine)
    caption = f"`{op}` on {gpu}, {dtype}{', ' if sizes else ''}{sizes}, {UNITS.get(op, 'ms')}:"
    lines = ["", caption, "", *table(op, alone), ""] if alone else [""]
    if full := [row for row in mine if row["batch"]]:
        lines += [LARGEST, "", *largest(full), ""]
    lines += [peak_memory(mine) + provenance(mine, rows), ""]
    for image in images:
        lines += [f"![{image.alt}]({image.path.relative_to(root).as_posix()})", ""]
    return "\n".join(lines)


def folded(gpu: str, text: str) -> str:
    """A section that a reader opens."""
    return f"\n<details>\n<summary>The same on {gpu}</summary>\n{text}\n</details>\n"


def readme_with(text: str, rows_of: dict[str, list[Row]], images: Sequence[Drawing], root: Path):
    """The README with every block written anew; a block whose op has no rows is empty."""

    def block(found: re.Match) -> str:
        op = found[2]
        if op in TABLES:
            return found[1] + TABLES[op](root) + found[3]
        sections: list[str] = []
        for gpu, rows in rows_of.items():
            mine = [i for i in images if (i.gpu, i.plot.op) == (gpu, op)]
            if any(row["op"] == op for row in rows):
                text = section(op, rows, mine, root)
                sections.append(folded(gpu, text) if sections else text)
        return found[1] + "".join(sections) + found[3]

    return BLOCK.sub(block, text)


def results(root: Path) -> dict[str, list[Row]]:
    """GPU -> its rows, of all results files of a repository; first the GPU with the most."""
    files = sorted((root / "benchmarks/results").glob("*.jsonl"))
    # a column that is younger than a row is empty there
    empty: Row = dict.fromkeys(COLUMNS)
    rows_of: dict[str, list[Row]] = {}
    for row in (empty | row for file in files for row in read(file)):
        rows_of.setdefault(row["gpu"], []).append(row)
    return dict(sorted(rows_of.items(), key=lambda found: (-len(found[1]), found[0])))


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns 1 if `--check` finds something out of date, 0 otherwise."""
    summary = "Write the tables of the README and draw the plots from the results."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=summary)
    parser.add_argument("--check", action="store_true", help="write nothing, report what would be")
    check = parser.parse_args(argv).check

    rows_of = results(root)
    folder, readme = root / "benchmarks/plots", root / "README.md"
    wanted = drawings(rows_of, folder)
    text = readme.read_text("utf-8")
    new_text = readme_with(text, rows_of, wanted, root)
    undrawn = [drawing for drawing in wanted if not drawing.is_drawn()]
    stale = sorted(set(folder.glob("*.svg")) - {drawing.path for drawing in wanted})
    changed = [*([readme] if new_text != text else []), *(d.path for d in undrawn), *stale]
    for path in changed:
        print(f"{path.relative_to(root)}: {'out of date' if check else 'written'}")
    if check:
        return 1 if changed else 0
    for drawing in undrawn:
        draw(drawing, PROVIDERS)
    readme.write_text(new_text, "utf-8")
    for path in stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
