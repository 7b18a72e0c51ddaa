"""Two processes, and one while the other waits; run as a script, one of the two."""

import sys
from pathlib import Path

import pytest

from benchmarks import context, report
from benchmarks.results import read
from tests.benchmarks.test_memory import TOY
from tests.model.helpers import run_two_processes

README = "<!-- bench:context -->\nold\n<!-- /bench:context -->\n"


def test_on_one_and_on_two(tmp_path):
    out = tmp_path / context.FOLDER / "toy.jsonl"
    for _ in range(2):  # rows are replaced
        run_two_processes(Path(__file__), str(out))
    rows = read(out)
    assert [(row["tokens"], row["gpus"]) for row in rows] == [(48, 1), (48, 2), (64, 1), (64, 2)]
    assert all(row["ms"] > 0 and row["git"] == "abc" for row in rows)
    (tmp_path / "README.md").write_text(README)
    assert report.main([], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "4 layers of 12 experts" in text and "at abc" in text
    assert text.count("| 48 | 1 |") == text.count("| 64 | 2 |") == 1 and "| 1.00 |" in text


def test_without_a_launcher(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        context.main([])
    assert "want several processes" in capsys.readouterr().err


if __name__ == "__main__":
    context.main(["--out", sys.argv[1], "--git", "abc"], TOY | {"L": 4}, (48, 64))
