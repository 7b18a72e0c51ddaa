"""The results files: one JSON line per measurement, replaced by key, in `results/<gpu>.jsonl`."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("op", "mode", "provider", "shape", "dtype", "gpu")
COLUMNS = (  # times in ms, rates in TFLOP/s and GB/s, memory in MB (1e6 bytes), error relative
    *KEY[:5],
    *("ms_p50", "ms_p20", "ms_p80", "tflops", "gbps", "peak_mb", "error"),
    # where the shape leaves B open: the batch, and what the cache of one of its sequences takes
    *("batch", "cache_mb"),
    *("gpu", "torch", "triton", "provider_version", "git", "date"),
)


def slug(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`; a name without such a word -> the name, joined by `_`."""
    model = re.search(r"\b[A-Z]{1,3}\d{2,4}[A-Za-z]?\b", gpu)
    return (model[0] if model else re.sub(r"\W+", "_", gpu)).lower()


def label(shape: dict[str, int]) -> str:
    """Batch, tokens and heads, as far as the shape has them: `1 x 8192 x 32`.

    New tokens, if there is a context of S of them: N or one, `1 x 64 x 32 after 1024`; the batch
    is then `max` if it is open.
    """
    context = "S" in shape
    sizes: dict[str, int | str] = {"B": "max", "T": shape.get("N", 1)} if context else {}
    sizes |= shape
    text = " x ".join(str(sizes[letter]) for letter in "BTH" if letter in sizes)
    return f"{text} after {shape['S']}" if context else text


def sort_key(row: Row) -> tuple:
    """By op and mode, then shape (numbers, not text), then provider."""
    shape = tuple(sorted(row["shape"].items()))
    return row["gpu"], row["op"], row["mode"], shape, row["dtype"], row["provider"]


def read(path: Path) -> list[Row]:
    """The rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def per_token(row: Row) -> float:
    """Milliseconds of one step for each of its rows."""
    return row["ms_p50"] / row["batch"]


def update(
    path: Path, row: Row, key: Sequence[str], order: Callable[[Row], tuple] | None = None
) -> None:
    """Write `row` to a file, in place of the one with the same `key`: last, or in an `order`."""
    rows = [r for r in read(path) if any(r[name] != row[name] for name in key)] + [row]
    if order is not None:
        rows.sort(key=order)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    new.replace(path)


def replace(path: Path, row: Row) -> None:
    """Write `row` to the file, in place of the one with the same key.

    Raises:
        ValueError: the row does not have exactly the columns.
    """
    if set(row) != set(COLUMNS):
        raise ValueError(f"row has the columns {sorted(row)}, want {sorted(COLUMNS)}")
    update(path, {column: row[column] for column in COLUMNS}, KEY, sort_key)
