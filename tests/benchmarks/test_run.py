"""benchmarks.run at toy sizes: what is measured, refused, reported and written."""

import math
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import capacity, guard, results, run, timing
from benchmarks.ops import OPS
from benchmarks.providers import Provider, gradient

TOY = {"B": 1, "T": 70, "H": 2, "K": 64, "V": 64, "W": 4}
TOY |= {"L": 4, "D": 32, "E": 12, "F": 16, "R": 16, "vocab": 64, "S": 37, "N": 3}
OURS = ["--provider", "ours", "reference", "floor"]
NORM = next(op for op in OPS if op.name == "gated_norm")
RUN_TESTS = guard.run_tests
REFERENCE = NORM.providers["reference"].build


def toy(op, **sizes):
    return {letter: size for letter, size in (TOY | sizes).items() if letter in op.shapes[0]}


def option(shape) -> list[str]:
    return ["--shape", ",".join(f"{letter}={size}" for letter, size in shape.items())]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few samples, of little, however slow this machine is now."""
    monkeypatch.setattr(timing, "SECONDS", 0)
    monkeypatch.setattr(timing, "LONG", math.inf)
    monkeypatch.setattr(timing, "COLD_BYTES", 2**20)


@pytest.fixture
def green(monkeypatch):
    """All guarding tests pass, at once. Collects which were asked for."""
    asked = []
    monkeypatch.setattr(guard, "run_tests", lambda tests, timeout: asked.append(tests))
    return asked


@pytest.fixture
def bench(tmp_path, green):
    """Runs gated_norm at toy sizes with the given providers -> exit status, rows, by provider."""

    def run_it(*args, providers=None, shapes=None, **changes):
        op = replace(NORM, shapes=shapes or (toy(NORM),), **changes)
        op = replace(op, providers=op.providers if providers is None else providers)
        out = tmp_path / "out.jsonl"
        status = run.main(["--out", str(out), *args], [op])
        return status, {row["provider"]: row for row in results.read(out)}

    return run_it


@pytest.fixture
def real_tests(monkeypatch, green):
    monkeypatch.setattr(guard, "run_tests", RUN_TESTS)


def raising(x):
    raise RuntimeError("no kernel today")


def wrong(x):
    return lambda: (2 * REFERENCE(x)()[0],)


# ---- what is measured --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [op for op in OPS if op.timer in ("events", "graph")],
    ids=lambda op: f"{op.name}-{op.mode}",
)
def test_every_timed_op(op, tmp_path, green):
    out = tmp_path / "out.jsonl"
    args = ["--op", op.name, "--mode", op.mode, "--out", str(out), "--git", "abc", *OURS]
    assert run.main([*args, *option(toy(op))]) == 0
    rows = {(row["op"], row["provider"]): row for row in results.read(out)}
    wanted = {"ours", "floor"}
    wanted |= {"reference"} if op.providers["reference"].fits(toy(op)) else set()
    ceilings = {("copy", "torch"), ("matmul", "torch")}
    assert set(rows) == {(op.name, name) for name in wanted} | ceilings
    ours, floor = rows[op.name, "ours"], rows[op.name, "floor"]
    assert tuple(ours) == results.COLUMNS
    assert (ours["mode"], ours["shape"], ours["dtype"]) == (op.mode, toy(op), "bfloat16")
    assert 0 < ours["ms_p20"] <= ours["ms_p50"] <= ours["ms_p80"]
    assert ours["gbps"] == pytest.approx(op.bytes(toy(op)) / ours["ms_p50"] / 1e6, rel=1e-3)
    assert ours["tflops"] == pytest.approx(op.flops(toy(op)) / ours["ms_p50"] / 1e9, rel=1e-3)
    assert (ours["peak_mb"] is None) == (ours["gpu"] == "cpu")
    assert (ours["git"], ours["torch"]) == ("abc", torch.__version__)
    assert floor["ms_p20"] is None
    times = [op.bytes(toy(op)) / rows["copy", "torch"]["gbps"] / 1e6]
    times.append(op.flops(toy(op)) / rows["matmul", "torch"]["tflops"] / 1e9)
    assert floor["ms_p50"] == pytest.approx(max(times), rel=1e-3)
    assert green == [op.tests]


def test_the_largest_batch(tmp_path, green, monkeypatch):
    """Of each provider its own, which is not in the shape; it is what the costs are of."""
    (op,) = (op for op in OPS if op.timer == "largest")
    shape, out = toy(op), tmp_path / "out.jsonl"
    assert op.memory is not None
    free = op.memory(shape) + capacity.MARGIN + 40 * capacity.row_bytes(op.providers["ours"], shape)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free + 1)
    assert run.main(["--mode", op.mode, "--out", str(out), *option(shape)]) == 0
    rows = {row["provider"]: row for row in results.read(out)}
    floors = {"ours": "floor", "all_mla": "floor_all_mla", "fp8": "floor_fp8"}
    assert set(rows) == {*floors, *floors.values(), "torch"}
    for name, floor in floors.items():
        provider, row = op.providers[name], rows[name]
        full = shape | {"B": row["batch"]}
        left = free - op.memory(shape) - capacity.MARGIN
        assert full["B"] * capacity.row_bytes(provider, shape) <= left + 1
        assert (full["B"] + 1) * capacity.row_bytes(provider, shape) > left
        assert row["shape"] == shape and rows[floor]["batch"] == row["batch"]
        size = (provider.bytes or op.bytes)(full)
        assert row["gbps"] * row["ms_p50"] == pytest.approx(size / 1e6, rel=1e-3)
        states = 3 * (2 * 64 * 64 * 4 + 3 * 3 * 2 * 64 * 2)
        latents = {"ours": 48 * 2, "all_mla": 4 * 48 * 2, "fp8": 16 + 32 * 2 + 4}[name]
        cache = 37 * latents + (0 if name == "all_mla" else states)
        assert row["cache_mb"] * 1e6 == pytest.approx(cache, rel=1e-3)
    assert rows["ours"]["batch"] == 40 != rows["all_mla"]["batch"]


def test_what_does_not_fit_is_left_out(tmp_path, green, monkeypatch, capsys):
    """It is no failure: another GPU may have the memory."""
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(capacity, "free_bytes", lambda device: capacity.MARGIN)
    for mode in ("throughput", "decode_step", "prefill"):
        (op,) = (op for op in OPS if op.mode == mode)
        args = ["--mode", mode, "--provider", "ours", "--out", str(out), *option(toy(op))]
        assert run.main(args) == 0
    assert results.read(out) == []
    told = capsys.readouterr().out
    assert (
        "model throughput max x 1 x 2 after 37 ours: left out, no sequence fits into 3 GB" in told
    )
    assert "model prefill 1 x 70 x 2 case: left out, 3 GB do not fit into 3 GB" in told


@pytest.mark.parametrize("mode", ["cold", "cold_train"])
def test_cold(mode, tmp_path, green):
    out = tmp_path / "out.jsonl"
    args = ["--mode", mode, "--provider", "ours", "--out", str(out)]
    assert run.main([*args, *option(toy(OPS[0]))]) == 0
    (row,) = results.read(out)
    assert row["mode"] == mode and row["ms_p50"] > 0 and row["ms_p20"] is None


def test_cold_that_fails(tmp_path, green, capsys):
    out = tmp_path / "out.jsonl"
    args = ["--mode", "cold", "--provider", "ours", "--out", str(out), "--shape", "H=-1"]
    assert run.main(args) == 1
    assert "kda cold 1 x 8192 x -1 ours: NOT MEASURED" in capsys.readouterr().out
    assert results.read(out) == []


@pytest.mark.parametrize("mode", ["error", "error_strong"])
def test_error(mode, tmp_path, green):
    """fp32 arithmetic against fp64, or on a GPU our kernels; no time, and no floor."""
    out = tmp_path / "out.jsonl"
    args = ["--op", "kda_gradients", "--mode", mode, "--out", str(out)]
    assert run.main([*args, *option(toy(OPS[0]))]) == 0
    rows = {row["provider"]: row for row in results.read(out)}
    assert {"ours", "reference"} <= set(rows) <= {"ours", "reference", "fla"}
    assert 0 < rows["reference"]["error"] < 1e-4
    assert 0 < rows["ours"]["error"] < guard.AGREEMENT
    assert all(rows["ours"][column] is None for column in ("ms_p50", "ms_p20", "tflops", "gbps"))


def test_gradient_of_one_input():
    op = next(op for op in OPS if op.name == "kda" and op.mode == "train")
    x = op.inputs(toy(op), torch.bfloat16, torch.device("cpu"))
    build = op.providers["ours"].build
    _, *every, _ = build(x)()
    (one,) = gradient("A_log", build)(x)()
    assert torch.equal(one, every[-1]) and one.shape == x["A_log"].shape


def test_an_output_that_is_not_finite_has_no_error(bench, capsys):
    bad = Provider(lambda x: lambda: (math.nan * REFERENCE(x)()[0],))
    providers = {"bad": bad, "reference": NORM.providers["reference"]}
    status, rows = bench(providers=providers, timer="error")
    assert status == 1 and set(rows) == {"reference"}
    assert "bad: NOT MEASURED, an output is not finite" in capsys.readouterr().out


def test_provider_with_costs_of_its_own(bench):
    dear = replace(NORM.providers["ours"], flops=lambda s: 7e9 * s["T"], bytes=lambda s: 3e9)
    rows = bench("--provider", "ours", "dear", providers=NORM.providers | {"dear": dear})[1]
    assert rows["dear"]["tflops"] * rows["dear"]["ms_p50"] == pytest.approx(7 * 70, rel=1e-3)
    assert rows["dear"]["gbps"] * rows["dear"]["ms_p50"] == pytest.approx(3e3, rel=1e-3)
    assert rows["ours"]["gbps"] * rows["ours"]["ms_p50"] < 1


def test_rows_are_replaced(bench):
    first = bench("--git", "one", *OURS)[1]
    second = bench("--git", "two", "--provider", "ours")[1]
    assert set(first) == set(second)
    assert second["ours"]["git"] == "two"
    assert second["reference"] == first["reference"]


def test_contestants_take_turns():
    calls = []
    contestants = {name: timing.one_call(lambda name=name: calls.append(name)) for name in "ab"}
    samples = timing.sample(contestants, torch.device("cpu"))
    burst = timing.BURST
    assert calls[: 4 * burst] == 2 * (["a"] * burst + ["b"] * burst)
    assert len(samples["a"]) == len(samples["b"]) == len(calls) / 2 - burst


def test_long_calls_are_few(monkeypatch):
    """A call of minutes is made twice: to get warm, and to be timed, beside short ones."""
    monkeypatch.setattr(timing, "LONG", 1e-3)
    calls = []
    seconds, _ = timing.warm_up(lambda: calls.append(time.sleep(2e-3)), torch.device("cpu"))
    assert seconds > 2e-3 and len(calls) == 2
    contestants = {
        "long": timing.one_call(lambda: calls.append(0), seconds),
        "short": timing.one_call(lambda: None, 0.5e-3),
    }
    samples = timing.sample(contestants, torch.device("cpu"))
    assert samples["long"] == [1e3 * seconds] and len(samples["short"]) > 1
    assert len(calls) == 2


def test_a_graph_counts_per_call():
    timed = timing.graph([lambda: time.sleep(2e-3)] * 5, torch.device("cpu"))
    assert 2 <= min(timing.sample({"a": timed}, torch.device("cpu"))["a"]) < 5


def test_the_calls_of_a_graph_have_their_inputs(bench, monkeypatch):
    built = []
    counted = Provider(lambda x: built.append(x["call"]) or REFERENCE(x["x"]))
    monkeypatch.setattr(timing, "graph_copies", lambda bytes_per_call, device: 3)
    changes = {"timer": "graph", "check": None, "rotate": lambda x, i: {"x": x, "call": i}}
    assert set(bench("--provider", "counted", providers={"counted": counted}, **changes)[1])
    assert built == [0, 1, 2]


def test_quantiles():
    assert timing.quantiles([3.0, 1.0, 2.0, 4.0, 6.0, 5.0]) == pytest.approx((2, 3.5, 5))


# ---- what is refused or left out ---------------------------------------------------------------


def test_red_tests(bench, real_tests, tmp_path, capsys):
    test, log = tmp_path / "test_red.py", tmp_path / "log"
    test.write_text(f"def test():\n    open({str(log)!r}, 'a').write('x')\n    assert 1 == 2\n")
    status, rows = bench(tests=str(test), shapes=(toy(NORM), toy(NORM, T=9)))
    assert (status, rows) == (1, {})
    assert "assert 1 == 2" in capsys.readouterr().out
    assert log.read_text() == "x", "tests run once per invocation"


def test_green_tests(bench, real_tests, tmp_path):
    test = tmp_path / "test_green.py"
    test.write_text("def test(): pass\n")
    status, rows = bench("--provider", "ours", tests=str(test))
    assert (status, set(rows)) == (0, {"ours"})


def test_no_tests(bench, real_tests, capsys):
    assert bench(tests="tests/kernels/test_nothing*.py") == (1, {})
    assert "no test file tests/kernels/test_nothing*.py" in capsys.readouterr().out


def test_missing_baseline(bench, capsys):
    absent = Provider(REFERENCE, module="no_such_library", package="no-such-library")
    status, rows = bench(providers=NORM.providers | {"absent": absent}, shapes=(toy(NORM),) * 2)
    assert status == 0 and set(rows) >= {"ours", "reference"} and "absent" not in rows
    assert capsys.readouterr().out.count("no_such_library: missing") == 1


@pytest.mark.parametrize("build, why", [(raising, "no kernel today"), (wrong, "differs from the")])
@pytest.mark.parametrize("own", [True, False])
def test_failing_provider(bench, capsys, build, why, own):
    bad = Provider(build, module=None if own else "math")
    status, rows = bench(*OURS, "bad", providers=NORM.providers | {"bad": bad})
    assert status == own
    assert set(rows) == {"ours", "reference", "floor", "torch"}
    assert (
        f"gated_norm forward 1 x 70 x 2 bad: NOT MEASURED, {'' if build is wrong else 'Run'}"
        in (out := capsys.readouterr().out)
    )
    assert why in out


def test_provider_that_answers_another_question(bench):
    """It is compared with its own reference."""
    doubled = Provider(wrong, expected=wrong)
    assert "bad" in bench("--provider", "bad", providers=NORM.providers | {"bad": doubled})[1]


def test_provider_that_does_not_fit(bench):
    picky = Provider(REFERENCE, fits=lambda shape: shape["T"] < 10)
    providers = {"picky": picky, "reference": picky}
    assert bench("--provider", "picky", providers=providers) == (0, {})


@pytest.mark.parametrize("value, error", [(1.0, 0), (1.1, 0.1), (math.nan, math.inf)])
def test_disagreement(value, error):
    ones = torch.ones(3)
    assert guard.disagreement([ones, value * ones], [ones, ones]) == pytest.approx(error)


def test_disagreement_in_shape():
    with pytest.raises(guard.Refused, match=r"an output is \[3\], the reference has \[1, 3\]"):
        guard.disagreement([torch.ones(3)], [torch.ones(1, 3)])


# ---- the budget --------------------------------------------------------------------------------


def test_no_budget(bench, green, capsys):
    assert bench("--budget", "0") == (0, {})
    assert "not measured: gated_norm forward 1 x 70 x 2" in capsys.readouterr().out
    assert green == []


def test_budget_ends_between_cases(bench, capsys):
    def slow(x):
        time.sleep(0.6)
        return REFERENCE(x)

    providers = {"slow": Provider(slow), "reference": NORM.providers["reference"]}
    shapes = (toy(NORM), toy(NORM, T=9))
    args = ("--budget", "0.5", "--provider", "slow", "reference")
    status, rows = bench(*args, providers=providers, shapes=shapes)
    assert (status, set(rows)) == (0, {"slow"})
    assert rows["slow"]["shape"] == toy(NORM)
    out = capsys.readouterr().out
    assert "reference: NOT MEASURED, cut off by the budget" in out
    assert "the budget of 0.5 s is spent; not measured: gated_norm forward 1 x 9 x 2" in out


def test_budget_cuts_tests_off(bench, real_tests, tmp_path, capsys):
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test(): time.sleep(60)\n")
    assert bench("--budget", "1", tests=str(test)) == (0, {})
    assert "cut off by the budget" in capsys.readouterr().out


# ---- arguments and files -----------------------------------------------------------------------


def test_shapes():
    kda = OPS[0]
    assert run.shapes(kda, []) == list(kda.shapes)
    assert [s["B"] for s in run.shapes(kda, [{"T": 2048}])] == [1, 8]
    assert run.shapes(kda, [{"T": 3, "H": 2}]) == [kda.shapes[0] | {"T": 3, "H": 2}]


@pytest.mark.parametrize(
    "args", [["--op", "nothing"], ["--provider", "nobody"], ["--shape", "W=4"], ["--shape", "T"]]
)
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "kda", *args])
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "gpu, slug",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("cpu", "cpu"),
    ],
)
def test_slug(gpu, slug):
    assert results.slug(gpu) == slug


def test_replace(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    row = dict.fromkeys(results.COLUMNS) | {"op": "a", "mode": "b", "provider": "c"}
    row |= {"shape": {"T": 9}, "dtype": "d", "gpu": "g", "ms_p50": 1.0}
    changes = [{"shape": {"T": 10}}, {"gpu": "h"}, {"mode": "a"}, {"provider": "b"}, {"op": "A"}]
    for other in [row, *(row | change for change in changes)]:
        results.replace(path, other)
    results.replace(path, row | {"ms_p50": 2.0})
    rows = results.read(path)
    assert len(rows) == 6 and rows == sorted(rows, key=results.sort_key)
    assert [r["ms_p50"] for r in rows].count(2.0) == 1
    assert [r["shape"]["T"] for r in rows if r["op"] == "a" and r["gpu"] == "g"] == [9, 9, 9, 10]
    with pytest.raises(ValueError, match="row has the columns"):
        results.replace(path, {"op": "a"})
