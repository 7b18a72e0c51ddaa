"""benchmarks.report: tables between the markers, plots, and --check."""

import json

import pytest

from benchmarks import paper, plots, report, results
from benchmarks.ops import OPS

README = """# Title
<!-- bench:kda -->
<!-- /bench:kda -->
between
<!-- bench:conv -->
old
<!-- /bench:conv -->
end
"""
EMPTY = README.replace("old\n", "")
H100 = "NVIDIA H100 80GB HBM3"


def make_row(provider="ours", ms=1.0, T=8192, **changes):
    row = dict.fromkeys(results.COLUMNS)
    row |= {"op": "kda", "mode": "forward", "provider": provider, "dtype": "bfloat16", "gpu": H100}
    row |= {"shape": {"B": 1, "T": T, "H": 32, "K": 128, "V": 128}, "ms_p50": ms}
    row |= {"torch": "2.11.0", "triton": "3.6.0", "git": "abc1234", "date": "2026-11-22"}
    return row | changes


@pytest.fixture
def repository(tmp_path):
    """A root with a README; called with rows, it writes them to the results files."""
    (tmp_path / "README.md").write_text(README)

    def add(*rows):
        for row in rows:
            path = tmp_path / "benchmarks" / "results" / f"{results.slug(row['gpu'])}.jsonl"
            results.replace(path, row)
        return tmp_path

    return add


def written(root) -> str:
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    return (root / "README.md").read_text()


def table(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_table(repository):
    root = repository(
        make_row("floor", 0.1114),
        make_row("fla", 1.2512, provider_version="fla-core 0.6.0"),
        make_row("ours", 0.5671),
        make_row("flash_kda", 1.0),
        make_row("ours", 2.0, mode="train"),
        make_row("fla", 1.0, mode="train"),
        make_row("ours", 12345.6, mode="cold"),
        make_row("torch", op="copy", shape={"N": 9}, gbps=3020.0),
        make_row("torch", op="matmul", shape={"M": 9}, tflops=712.3),
    )
    assert report.main(["--check"], root) == 1
    text = written(root)
    head = ["mode", "B x T x H", "ours", "fla", "FlashKDA, bounded gate", "floor", "ours / fla"]
    shape = "1 x 8192 x 32"
    assert table(text) == [
        head,
        ["---", "---", *["---:"] * 5],
        ["forward", shape, "0.567", "1.25", "1.00", "0.111", "0.45"],
        ["forward + backward", shape, "2.00", "1.00", "-", "-", "2.00"],  # a row where we lose
        ["first call, nothing compiled", shape, "12,346", "-", "-", "-", "-"],
    ]
    assert f"`kda` on {H100}, bfloat16, K 128, V 128, ms:" in text
    assert (
        "Copy 3.02 TB/s, matrix product 712 TFLOP/s, torch 2.11.0, triton 3.6.0, fla-core 0.6.0; "
        "measured 2026-11-22 at abc1234." in text
    )
    assert text.startswith("# Title\n<!-- bench:kda -->\n") and text.endswith("end\n")
    assert "<!-- bench:conv -->\n<!-- /bench:conv -->" in text


def test_errors_have_a_table_of_their_own(repository):
    def row(provider, error, mode="error"):
        return make_row(provider, None, op="kda_gradients", mode=mode, error=error)

    rows = row("ours", 0.00351), row("fla", 0.00821), row("reference", 1.2e-6)
    root = repository(*rows, row("ours", 0.004, "error_strong"), make_row())
    readme = root / "README.md"
    blocks = "<!-- bench:kda_gradients -->\n<!-- /bench:kda_gradients -->\n"
    readme.write_text(README + blocks)
    text = written(root)
    assert "`kda_gradients` on NVIDIA H100 80GB HBM3, bfloat16, K 128, V 128, relative RMS " in text
    shape = "1 x 8192 x 32"
    assert table(text)[3:] == [
        ["mode", "B x T x H", "ours", "fla", "reference", "ours / fla"],
        ["---", "---", *["---:"] * 4],
        ["gates as a model starts", shape, "0.00351", "0.00821", "1.2e-06", "0.43"],
        ["strong gates", shape, "0.00400", "-", "-", "-"],
    ]


def test_the_native_model_is_a_baseline_and_memory_is_told(repository):
    root = repository(
        make_row("ours", 50.0, op="model", mode="train_step", peak_mb=16040.0),
        make_row("native", 100.0, op="model", mode="train_step", peak_mb=26660.0),
    )
    (root / "README.md").write_text(README + MODEL_BLOCK)
    text = written(root)
    assert table(text)[0][2:] == ["ours", "transformers + fla", "ours / native"]
    assert table(text)[2][2:] == ["50.0", "100", "0.50"]
    assert (
        "Peak memory of training above the inputs, GB: "
        "1 x 8192 x 32: transformers + fla 26.7, ours 16.0. torch 2.11.0" in text
    )


def test_the_experts_of_transformers_are_a_baseline(repository):
    widths = {"D": 2304, "E": 256, "F": 1024}
    shapes = [{"B": 1, "T": 8192} | widths, {"B": 8, "T": 1} | widths]
    root = repository(
        make_row("ours", 1.9, op="moe", shape=shapes[0]),
        make_row("grouped_mm", 3.8, op="moe", shape=shapes[0]),
        make_row("ours", 0.2, op="moe", mode="decode", shape=shapes[1]),
        make_row("batched_mm", 0.8, op="moe", mode="decode", shape=shapes[1]),
    )
    (root / "README.md").write_text(README + "<!-- bench:moe -->\n<!-- /bench:moe -->\n")
    text = written(root)
    names = ["ours", "transformers, grouped_mm", "transformers, batched_mm", "ours / grouped_mm"]
    assert table(text) == [
        ["mode", "B x T", *names],
        ["---", "---", *["---:"] * 4],
        ["forward", "1 x 8192", "1.90", "3.80", "-", "0.50"],
        ["decode step", "8 x 1", "0.200", "-", "0.800", "-"],
    ]
    assert "D 2304, E 256, F 1024, ms:" in text


def test_whole_models(repository):
    """Depths that differ have a column; new tokens after a context say after how many."""
    shapes = {op.mode: op.shapes for op in OPS if op.name == "model"}
    (train,), steps = shapes["train_step"], shapes["decode_step"]
    prefill, generate = shapes["prefill"][1], shapes["generate"][0]
    short, long, batch = steps[0], steps[0] | {"S": 1048576}, steps[0] | {"B": 32}

    def row(provider, ms, mode, shape):
        return make_row(provider, ms, op="model", mode=mode, shape=shape, peak_mb=9.0)

    root = repository(
        row("ours", 50.0, "train_step", train),
        row("ours", 40.0, "prefill", prefill),
        row("native", 80.0, "prefill", prefill),
        row("ours", 2.0, "decode_step", batch),
        row("ours", 1.6, "decode_step", short),
        row("native", 64.0, "decode_step", short),
        row("all_mla", 1.5, "decode_step", short),
        row("ours", 2.5, "decode_step", long),
        row("all_mla", 5.0, "decode_step", long),
        row("floor", 1.13, "decode_step", long),
        row("ours", 128.0, "generate", generate),
    )
    (root / "README.md").write_text(README + MODEL_BLOCK)
    text = written(root)
    names = ["ours", "transformers + fla", "ours, every layer MLA", "floor", "ours / native"]
    assert table(text) == [
        ["mode", "L", "B x T x H after S", *names],
        ["---", "---", "---", *["---:"] * 5],
        ["forward, loss, backward", "4", "1 x 4096 x 32", "50.0", "-", "-", "-", "-"],
        ["prompt", "8", "1 x 8192 x 32", "40.0", "80.0", "-", "-", "0.50"],
        ["decode step", "8", "1 x 1 x 32 after 1024", "1.60", "64.0", "1.50", "-", "0.03"],
        ["decode step", "8", "1 x 1 x 32 after 1048576", "2.50", "-", "5.00", "1.13", "-"],
        ["decode step", "8", "32 x 1 x 32 after 1024", "2.00", "-", "-", "-", "-"],
        ["`generate`, all T tokens", "8", "1 x 64 x 32 after 1024", "128", "-", "-", "-", "-"],
    ]
    sizes = "D 2304, K 128, E 256, F 1024, R 512, vocab 163840"
    assert f"`model` on {H100}, bfloat16, {sizes}, ms:" in text
    assert "training above the inputs, GB: 1 x 4096 x 32: ours 0.00900. " in text


def largest_rows(S: int, **steps: tuple[int, float]):
    """Of each provider: the batch, and ms of a step."""
    shape = next(op.shapes[0] for op in OPS if op.mode == "throughput") | {"S": S}
    return [
        make_row(name, ms, op="model", mode="throughput", shape=shape, batch=B, cache_mb=2429.0)
        for name, (B, ms) in steps.items()
    ]


MODEL_BLOCK = "<!-- bench:model -->\n<!-- /bench:model -->\n"


def test_largest_batches(repository):
    """A table of their own: time per token, and how much longer every layer MLA takes."""
    rows = largest_rows(1048576, ours=(50, 40.0), all_mla=(10, 30.0), floor=(50, 30.0))
    rows += largest_rows(1048576, floor_all_mla=(10, 27.0)) + largest_rows(4096, ours=(1024, 20.0))
    root = repository(*rows)
    (root / "README.md").write_text(README + MODEL_BLOCK)
    text = written(root)
    head, _, *lines = table(text)
    assert head[4:] == [
        "GB per sequence", "batch", "ms per step", "ms per token", "its floor", "tokens per s",
        "every layer MLA / this", "by the floors",
    ]  # fmt: skip
    at, mla = ("8", "256"), "ours, every layer MLA"
    assert lines == [
        [*at, "4096", "ours", "2.43", "1,024", "20.0", "0.0195", "-", "51,200", "-", "-"],
        [*at, "1048576", "ours", "2.43", "50", "40.0", "0.800", "0.600", "1,250", "3.75", "4.50"],
        [*at, "1048576", mla, "2.43", "10", "30.0", "3.00", "2.70", "333", "1.00", "1.00"],
    ]
    assert "at most 1,024 sequences" in text and "measured 2026-11-22 at abc1234." in text


def test_rows_older_than_a_column(repository):
    old = make_row()
    del old["batch"], old["cache_mb"]
    root = repository(make_row("fla"))
    path = root / "benchmarks/results/h100.jsonl"
    path.write_text(path.read_text() + json.dumps(old) + "\n")
    assert table(written(root))[2][2:] == ["1.00", "1.00", "1.00"]


def test_rows_are_ordered_as_declared(repository):
    """Modes and shapes; a shape that is not declared comes last."""
    shapes = [{"B": b, "T": t, "H": 32, "K": 128, "V": 128} for b, t in ((1, 77), (8, 2048))]
    trained = [make_row(shape=shape, mode="train") for shape in shapes]
    rows = table(written(repository(*trained, make_row(mode="train"), make_row())))[2:]
    labels = ["1 x 8192 x 32", "1 x 8192 x 32", "8 x 2048 x 32", "1 x 77 x 32"]
    assert [line[1] for line in rows] == labels
    assert [line[0] for line in rows] == ["forward"] + 3 * ["forward + backward"]


def test_a_table_per_gpu(repository):
    """The GPU with the most rows is in sight, the others are folded."""
    more = [make_row(gpu="NVIDIA H200", ms=0.5, mode=mode) for mode in ("forward", "train")]
    text = written(repository(make_row(), *more))
    first, second = text.split("<details>\n")
    assert [line[-1] for line in table(first)] == ["ours", "---:", "0.500", "0.500"]
    assert second.startswith(f"<summary>The same on {H100}</summary>\n\n`kda` on {H100}, ")
    assert second.index("</details>") < second.index("<!-- /bench:kda -->")
    assert [line[-1] for line in table(second)] == ["ours", "---:", "1.00"]


def test_what_was_measured_at_two_commits(repository):
    text = written(repository(make_row(), make_row("fla", git="def5678", date="2026-11-30")))
    assert "measured 2026-11-22 to 2026-11-30 at abc1234, def5678." in text


def test_without_results(repository):
    root = repository()
    assert report.main(["--check"], root) == 1  # "old"
    assert written(root) == EMPTY


def test_results_that_are_gone(repository, capsys):
    root = repository(make_row())
    assert written(root) != EMPTY
    (root / "benchmarks/results/h100.jsonl").unlink()
    assert report.main(["--check"], root) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert written(root) == EMPTY


@pytest.mark.parametrize(
    "x, text",
    [
        (0.0, "0.0e+00"),
        (2.13e-6, "2.1e-06"),
        (0.01442, "0.0144"),
        (0.1, "0.100"),
        (1.256, "1.26"),
        (23.34, "23.3"),
        (12345.6, "12,346"),
    ],
)
def test_digits(x, text):
    assert report.digits(x) == text


# ---- plots -------------------------------------------------------------------------------------


def test_curves():
    rows = [make_row(T=8192, ms=0.5), make_row(T=2048, ms=0.2), make_row("fla", T=2048)]
    other_heads = make_row(shape={"B": 1, "T": 4096, "H": 8, "K": 128, "V": 128})
    no_times = [make_row(ms=None, error=0.1), make_row(mode="train")]
    found = plots.curves(plots.PLOTS[0], [*rows, other_heads, *no_times])
    assert found == {"fla": [[2048, 488.3]], "ours": [[2048, 97.66], [8192, 61.04]]}
    assert plots.curves(plots.PLOTS[0], rows[1:]) == {}


def test_ratios_beside_the_paper():
    """Time per token at batches of their own; the paper's points are as its caption has them."""
    (plot,) = (plot for plot in plots.PLOTS if plot.mode == "throughput")
    rows = largest_rows(4096, ours=(1024, 20.48), all_mla=(1024, 20.48))
    rows += largest_rows(2**20, ours=(50, 40.0), all_mla=(10, 30.0), floor=(50, 30.0))
    rows += largest_rows(2**20, floor_all_mla=(10, 27.0))
    lines = plots.curves(plot, rows)
    assert list(lines) == ["ours", "all_mla", "floor", "floor_all_mla"]
    assert lines["ours"] == [[4096, 0.02], [2**20, 0.8]]
    found = plots.ratios(plot, lines)
    assert found["measured"] == [[4096, 1.0], [2**20, pytest.approx(3.75)]]
    assert found["by the floors"] == [[2**20, pytest.approx(4.5)]]
    assert found["paper *"][-1] == [2**20, 11.48 / 1.84] and len(found["paper *"]) == 9
    assert plots.ratios(plots.PLOTS[0], lines) == {
        name: points for name, points in found.items() if name != "paper *"
    }


@pytest.mark.parametrize("mode", ["prefill", "decode_step", "throughput"])
def test_plot_beside_the_paper(repository, mode):
    """The paper's points are drawn, marked as such, and told apart from what was measured here."""
    (op,) = (op for op in OPS if op.mode == mode)
    batch = {"batch": 9, "cache_mb": 1.0} if mode == "throughput" else {}
    root = repository(
        *(
            make_row(name, 2.0, op="model", mode=mode, shape=shape, **batch)
            for shape in op.shapes[:3]
            for name in ("ours", "all_mla")
        )
    )
    (root / "README.md").write_text(README + MODEL_BLOCK)
    text = written(root)
    (path,) = (root / "benchmarks/plots").iterdir()
    assert f", 8 layers, {H100}: time per " in text and f"](benchmarks/plots/{path.name})" in text
    drawn = path.read_text()
    for words in ("paper *: Kimi Linear", "paper *: every layer MLA", f"* {paper.SOURCE}"):
        assert f">{words}</text>" in drawn
    assert ">every layer MLA / Kimi Linear</text>" in drawn and ">1M</text>" in drawn


def test_undrawn_plot(repository, capsys):
    root = repository(make_row(T=2048), make_row(T=8192))
    assert report.main(["--check"], root) == 1
    assert "benchmarks/plots/kda_forward_h100.svg: out of date" in capsys.readouterr().out


def test_plot(repository):
    root = repository(make_row(T=2048), make_row(T=8192), make_row("floor", T=2048))
    text, path = written(root), root / "benchmarks/plots/kda_forward_h100.svg"
    assert f"](benchmarks/plots/{path.name})" in text
    first = path.read_bytes()
    assert b"<dc:date>" not in first
    path.unlink()
    assert written(root) == text
    assert path.read_bytes() == first

    repository(make_row(T=8192, git="def5678"))
    assert report.main(["--check"], root) == 1
    written(root)
    assert path.read_bytes() == first, "the same numbers, the same plot"

    repository(make_row(T=8192, ms=0.9))
    assert report.main(["--check"], root) == 1
    written(root)
    assert path.read_bytes() != first


def test_plot_that_is_no_longer_wanted(repository):
    root = repository()
    written(root)
    plot = root / "benchmarks/plots/kda_forward_h100.svg"
    plot.parent.mkdir(parents=True)
    plot.touch()
    assert report.main(["--check"], root) == 1
    written(root)
    assert not plot.exists()
