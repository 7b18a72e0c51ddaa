"""What fits: every setting runs at a tiny size, is written at once, and is shown in a table."""

import pytest
import torch

from benchmarks import memory, report
from benchmarks.memory import GRID, Setting
from benchmarks.results import read

TOY = {"D": 32, "H": 2, "K": 16, "E": 12, "F": 16, "R": 16, "vocab": 64}
SMALL = [Setting(s.trained, 4, s.optimizer) for s in GRID]
README = "<!-- bench:memory -->\nold\n<!-- /bench:memory -->\n"


def run(tmp_path, *options, grid=SMALL, lengths=(8, 16)) -> list[dict]:
    out = tmp_path / memory.FOLDER / "toy.jsonl"
    memory.main(["--out", str(out), "--git", "abc", *options], grid, TOY, lengths)
    return read(out)


def test_every_setting(tmp_path, capsys):
    rows = run(tmp_path)
    assert len(rows) == 4 * len(set(SMALL))
    assert all(row["fits"] and row["seconds"] > 0 and row["git"] == "abc" for row in rows)
    assert [row["checkpointing"] for row in rows[:4]] == [False, False, True, True]
    assert [row["tokens"] for row in rows[:4]] == [8, 16, 8, 16]
    lora = [row for row in rows if row["trained"] == "lora_experts"]
    assert lora[0]["parameters"] > rows[0]["parameters"]
    assert capsys.readouterr().out.count("\n") == 4 * len(SMALL)


def test_what_does_not_fit(tmp_path, monkeypatch):
    """The first that does not fit is tried, longer ones are not, and shorter ones are shown."""
    tried = []

    def measure(setting, model, ids):
        tried.append(ids.numel())
        if ids.numel() > 8:
            raise torch.OutOfMemoryError
        return 12.345, 0.5

    monkeypatch.setattr(memory, "measure", measure)
    run(tmp_path, grid=SMALL[:1], lengths=(8, 16, 32))
    assert tried == [8, 16, 8, 16]
    (tmp_path / "README.md").write_text(README)
    assert report.main([], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| L | trained | optimizer | checkpointing | 8 | 16 | 32 |" in text
    assert "| 4 | all | AdamW | yes | 12.3, 0.50 s | - | - |" in text and "at abc" in text
    assert report.main(["--check"], tmp_path) == 0


def test_a_model_that_does_not_fit(tmp_path, monkeypatch):
    def build(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "build", build)
    rows = run(tmp_path, grid=SMALL[:1])
    assert len(rows) == 4 and not any(row["fits"] for row in rows)


def test_budget_and_choice(tmp_path, capsys):
    rows = run(tmp_path, "--budget", "0", "--trained", "lora")
    assert [row["trained"] for row in rows] == ["lora"]
    assert "the budget of 0 s is spent" in capsys.readouterr().out
    again = run(tmp_path, "--budget", "0", "--trained", "lora")
    assert len(again) == 1  # replaced
    with pytest.raises(SystemExit):
        run(tmp_path, "--trained", "all")
