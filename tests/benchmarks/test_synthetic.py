"""benchmarks.synthetic: what the tasks ask, that every mixer learns, and what is shown of it."""

import contextlib
import json
import math
from concurrent.futures import Future

import pytest
import torch

from benchmarks.results import read
from benchmarks.synthetic import __main__ as cli
from benchmarks.synthetic import report, tasks
from benchmarks.synthetic.models import build
from benchmarks.synthetic.train import Outcome, Setting, Step, evaluate, train

CPU = torch.device("cpu")
SMALL = {"length": 16, "tokens": 512, "heads": 1, "head_dim": 16, "steps": 40, "every": 20}
H200 = "NVIDIA H200"


def palindrome_answers(ids: list[int]) -> dict[int, int]:
    """Position -> answer, token by token."""
    unread: list[int] = []
    answers, copying = {}, False
    for t, token in enumerate(ids):
        if copying:
            assert token == answers[t - 1]
        if token == tasks.SYMBOLS:
            copying = True
        elif not copying:
            unread.append(token)
        if copying:
            answers[t] = unread.pop()
    assert not unread
    return answers


def mqar_answers(ids: list[int]) -> dict[int, int]:
    value_of, answers, t = {}, {}, 0
    while ids[t] != 0:
        key, value = ids[t : t + 2]
        assert 0 < key < tasks.MQAR_VOCAB // 2 <= value < tasks.MQAR_VOCAB
        assert key not in value_of and value not in value_of.values()
        value_of[key] = value
        t += 2
    left: dict[int, int] = {}  # of a round
    for q in range(t + 1, len(ids), 2):
        left = left or dict(value_of)
        answers[q] = left.pop(ids[q])
        assert ids[q + 1 : q + 2] in ([answers[q]], [])
    assert not left or len(value_of) < len(ids) // 4  # of the most pairs each is asked once
    return answers


def stack_answers(ids: list[int]) -> dict[int, int]:
    stacks: dict[int, list[int]] = {}
    answers = {}
    for t in range(0, len(ids) - 1, 3):
        op, i, *x = ids[t : t + 3]
        assert op in (0, 1) and 0 <= i - 2 < tasks.STACKS
        assert all(0 <= y - 2 - tasks.STACKS < tasks.SYMBOLS for y in x)
        if op == 0:
            stacks.setdefault(i, []).extend(x)
        else:
            answers[t + 1] = stacks[i].pop()
            assert x in ([answers[t + 1]], [])
    return answers


@pytest.fixture
def on_cpu(monkeypatch):
    """The commands take the GPU that they find; what is tested is not their device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


SLOW = {"palindrome": palindrome_answers, "mqar": mqar_answers, "stack": stack_answers}


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("T", [4, 16, 100, 256, 2048])
def test_answers(name, T):
    task = tasks.TASKS[name]
    samples = [sample for sample in (task.sample, task.practice) if sample is not None]
    drawn = [sample(3, T, torch.Generator().manual_seed(T)) for sample in samples]
    ids, labels = (torch.cat(x) for x in zip(*drawn, strict=True))
    assert ids.shape == labels.shape == (3 * len(samples), T)
    assert ids.min() >= 0 and ids.max() < task.vocab
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        assert SLOW[name](row) == {t: x for t, x in enumerate(wanted) if x != tasks.IGNORED}
    elsewhere = torch.ones(T, dtype=torch.bool)
    elsewhere[task.asked(T)] = False
    assert (labels[:, elsewhere] == tasks.IGNORED).all()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_batches_differ_and_repeat(name):
    sample = tasks.TASKS[name].sample
    generator = torch.Generator().manual_seed(1)
    first, second = sample(2, 64, generator), sample(2, 64, generator)
    again = sample(2, 64, torch.Generator().manual_seed(1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0][0], first[0][1])


def test_mqar_pairs():
    """Measured with T / 4, each asked once; trained on 1 to T / 4, as many below 8 as above."""
    T = 256
    for sample in (tasks.mqar, tasks.mqar_practice):
        ids, labels = sample(2000, T, torch.Generator().manual_seed(0))
        n = (ids == 0).int().argmax(1) // 2
        assert ((ids == 0).sum(1) == 1).all()
        assert ((labels != tasks.IGNORED).sum(1) == (T - 2 * n) // 2).all()
        if sample is tasks.mqar:
            assert (n == T // 4).all()
        else:
            assert set(n.tolist()) == set(range(1, T // 4 + 1))
            assert 0.45 < (n < 8).double().mean() < 0.55


def test_stack_odds():
    """Against a simulation: how often a pop comes, and how deep stacks are."""
    ids, _ = tasks.stack(64, 1023, torch.Generator().manual_seed(0))
    ops, stacks = ids.view(64, -1, 3)[..., 0], ids.view(64, -1, 3)[..., 1]
    depth = torch.zeros(64, tasks.STACKS + 2, dtype=torch.int64)
    pops_of_full = []
    for op, i in zip(ops.T, stacks.T, strict=True):
        full = depth.gather(1, i[:, None])[:, 0] > 0
        assert (op[~full] == 0).all()
        pops_of_full.append(op[full])
        depth.scatter_add_(1, i[:, None], (1 - 2 * op)[:, None])
    assert torch.cat(pops_of_full).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert depth[:, 2:].double().mean().item() == pytest.approx(1.8, abs=0.15)  # sqrt(2 n / pi)


def test_kda_learns_palindromes():
    """From 1/64 of the answers: in 200 steps, of sequences it has never seen."""
    setting = Setting("palindrome", "kda", 16, lr=4e-3, tokens=512, heads=1, head_dim=16, steps=200)
    lines: list[str] = []
    outcome = train(setting, CPU, report=lines.append)
    assert outcome.accuracy > 0.5 and outcome.stop == "steps" and outcome.steps == 200
    assert outcome.curve == [[200, round(outcome.accuracy, 5)]] and len(lines) == 1


@pytest.mark.parametrize("mixer", cli.MIXERS)
@pytest.mark.parametrize("task", ["mqar", "stack"])
def test_every_mixer_trains(task, mixer):
    setting = Setting(task, mixer, lr=1e-2, **SMALL)
    torch.manual_seed(0)
    model = build(mixer, tasks.TASKS[task].vocab, 1, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = Step(model, tasks.TASKS[task].asked(16), torch.float32, eager=False)
    ids, labels = tasks.TASKS[task].sample(*setting.batch, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        step(ids, labels, setting.lr)
        losses.append(step.loss.item())
    assert losses[0] == pytest.approx(math.log(tasks.TASKS[task].vocab), rel=0.02)
    assert losses[-1] < 0.8 * losses[0]
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_scalar_gate_is_one_per_head():
    """What reaches KDA's kernels has one decay per head and token, and its own gradient."""
    x = torch.randn(2, 5, 48)
    model = build("scalar", 8, 3, 16)
    gate = model.model.layers[0].self_attn.forget_gate
    f, A_log, dt_bias = gate(x)
    assert f.shape == (2, 5, 48) and A_log.shape == (3,) and dt_bias.shape == (48,)
    f = f.unflatten(-1, (3, 16))
    torch.testing.assert_close(f, f[..., :1].expand_as(f))
    assert (dt_bias.view(3, 16) == dt_bias.view(3, 16)[:, :1]).all()
    assert f.std() > 0 and 1e-3 < torch.nn.functional.softplus(dt_bias).max() < 0.11
    sizes = {name: p.numel() for name, p in gate.named_parameters()}
    assert sizes["parametrizations.dt_bias.original"] == 3
    assert sizes["f_b_proj.parametrizations.weight.original"] == 3 * 16

    ids = torch.randint(8, (1, 20))
    before = model(ids).logits
    with torch.no_grad():
        gate.parametrizations.dt_bias.original.fill_(-20)  # keep everything
    assert (model(ids).logits != before).any()


@pytest.mark.parametrize("mixer", cli.MIXERS)
def test_mixers_differ_in_the_recurrence_alone(mixer):
    """Causal, and all but the gates as in KDA."""
    torch.manual_seed(0)
    model, kda = build(mixer, 16, 2, 16), build("kda", 16, 2, 16)
    shapes, of_kda = (
        {name: p.shape for name, p in m.named_parameters() if "forget_gate" not in name}
        for m in (model, kda)
    )
    without = {n for n in of_kda if n.endswith(".b_proj.weight")} if mixer == "softmax" else set()
    assert shapes == {name: shape for name, shape in of_kda.items() if name not in without}
    assert not [name for name in shapes if "experts" in name]
    ids = torch.randint(16, (1, 40))
    other = torch.where(torch.arange(40) < 20, ids, (ids + 1) % 16)
    a, b = (model(x).logits for x in (ids, other))
    assert torch.equal(a[:, :20], b[:, :20]) and (a[:, 20:] != b[:, 20:]).any(-1).all()


@pytest.mark.parametrize("mixer", ["kda", "scalar"])
def test_weights_are_trained_in_fp32(mixer):
    """Steps far below the resolution of bf16 add up; the gate's parameters stay fp32."""
    model = build(mixer, 65, 1, 16)
    step = Step(model, slice(8, None), torch.bfloat16, eager=False)
    ids, labels = tasks.palindrome(8, 16, torch.Generator().manual_seed(0))
    w = model.model.norm.weight
    for _ in range(2):
        step(ids, labels, 1e-4)
    assert w.dtype == torch.bfloat16 and (w == 1).all()
    for _ in range(60):
        step(ids, labels, 1e-4)
    assert (w != 1).any()
    gate = model.model.layers[0].self_attn.forget_gate
    assert gate.A_log.dtype == gate.dt_bias.dtype == torch.float32
    assert gate.f_b_proj.weight.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", cli.MIXERS)
def test_cuda_graph(mixer):
    """Steps by a graph follow those without one, on other batches and learning rates."""
    setting = Setting("mqar", mixer, 256, tokens=1024, steps=8)
    device, losses = torch.device("cuda"), {True: [], False: []}
    for eager, found in losses.items():
        torch.manual_seed(0)
        model = build(mixer, tasks.MQAR_VOCAB, 2, 128).to(device)
        step = Step(model, tasks.TASKS["mqar"].asked(256), torch.bfloat16, eager)
        generator = torch.Generator(device).manual_seed(0)
        for i in range(setting.steps):
            step(*tasks.mqar(*setting.batch, generator), setting.lr_at(i))
            found.append(step.loss.item())
        assert (step.graph is None) == eager
    assert losses[False] == pytest.approx(losses[True], rel=5e-3)
    assert len(set(losses[False])) == setting.steps


def test_evaluation_counts():
    """A model that always says token 3."""

    class Stub(torch.nn.Module):
        def model(self, ids):
            x = torch.nn.functional.one_hot(torch.full_like(ids, 3), 65).float()
            return type("Output", (), {"last_hidden_state": x})

        def lm_head(self, x):
            return x

    setting = Setting("palindrome", "kda", 4, tokens=4096)
    accuracy, exact = evaluate(Stub(), setting, CPU)
    assert accuracy == pytest.approx(1 / 64, rel=0.15)
    assert exact == pytest.approx(1 / 64**2, abs=1e-3)


def test_learning_rate():
    setting = Setting("stack", "kda", 256, lr=1.0, steps=1000)
    assert [setting.lr_at(i) for i in (0, 9, 19, 20)] == pytest.approx([0.05, 0.5, 1.0, 1.0])
    assert setting.lr_at(510) == pytest.approx(0.55)
    assert setting.lr_at(999) == pytest.approx(0.1, abs=1e-3)
    assert 0 < Setting("stack", "kda", 256, lr=1.0, steps=1).lr_at(0) <= 1


def test_a_solved_task_ends(monkeypatch):
    monkeypatch.setattr("benchmarks.synthetic.train.ENOUGH", 0.0)
    setting = Setting("palindrome", "softmax", **SMALL | {"every": 2})
    outcome = train(setting, CPU, report=lambda line: None)
    assert (outcome.stop, outcome.steps, len(outcome.curve)) == ("solved", 6, 3)


def test_run_and_report(tmp_path, on_cpu, capsys):
    """The commands: a row per run, replaced when run again, cut short by a budget."""
    out = tmp_path / "results" / "cpu.jsonl"
    argv = ["run", "--task", "palindrome", "--mixer", "softmax", "kda", "--length", "16"]
    argv += ["--steps", "2", "--every", "1", "--tokens", "64", "--git", "abc1234"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    assert cli.main([*argv, "--out", str(out), "--mixer", "softmax"]) == 0
    rows = read(out)
    assert [(row["mixer"], row["steps"], row["stop"]) for row in rows] == [
        ("kda", 2, "steps"), ("softmax", 2, "steps")
    ]  # fmt: skip
    assert {row["git"] for row in rows} == {"abc1234"} and len(rows[0]["curve"]) == 2
    assert "palindrome kda 16: step 2, loss" in capsys.readouterr().out

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- synthetic -->\nold\n<!-- /synthetic -->\nb\n")
    files = report.write(tmp_path)
    text, image = readme.read_text(), (tmp_path / "accuracy_cpu.svg").read_bytes()
    assert files == [readme, tmp_path / "accuracy_cpu.svg"]
    assert text.startswith("a\n<!-- synthetic -->\n") and text.endswith("<!-- /synthetic -->\nb\n")
    assert "| palindrome | KDA |" in text and "![accuracy against length](accuracy_cpu.svg)" in text
    assert report.write(tmp_path) == files
    assert (readme.read_text(), (tmp_path / "accuracy_cpu.svg").read_bytes()) == (text, image)


def test_a_run_that_raises_does_not_stop_the_others(tmp_path, on_cpu, monkeypatch, capsys):
    def failing(setting, *args, **kwargs):
        if setting.mixer == "kda":
            raise RuntimeError("broken")
        return Outcome(1, 0.1, 0.5, 0.0, [[1, 0.5]], "steps")

    monkeypatch.setattr("benchmarks.synthetic.train.train", failing)
    argv = ["run", "--task", "stack", "--length", "256", "--out", str(tmp_path / "x.jsonl")]
    assert cli.main(argv) == 1
    assert "stack kda 256 lr 0.001: NOT TRAINED" in capsys.readouterr().out
    assert [row["mixer"] for row in read(tmp_path / "x.jsonl")] == ["scalar", "softmax"]


def test_a_budget_is_shared(tmp_path, on_cpu, monkeypatch, capsys):
    """Every run gets its part of what is left, and none starts when nothing is."""
    clock, shares = [0.0], []

    def spend(setting, device, *, deadline, eager, report):
        shares.append(deadline - clock[0])
        clock[0] += 10 if len(shares) == 1 else 300
        return Outcome(1, 0.1, 0.5, 0.0, [[1, 0.5]], "budget")

    monkeypatch.setattr("benchmarks.synthetic.train.train", spend)
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    argv = ["run", "--task", "stack", "--length", "256", "--budget", "300"]
    assert cli.main([*argv, "--out", str(tmp_path / "x.jsonl")]) == 0
    assert shares == [100, 145]
    assert "the budget of 300 s is spent; 1 runs are left out" in capsys.readouterr().out


def test_runs_side_by_side(tmp_path, on_cpu, capsys):
    """By two processes into one file, with the numbers that they have one after the other."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    argv = ["run", "--task", "palindrome", "stack", "--mixer", "softmax", "--length", "16"]
    argv += ["--steps", "2", "--every", "1", "--tokens", "64", "--budget", "600", "--out"]
    assert cli.main([*argv, str(files[0])]) == 0
    assert cli.main([*argv, str(files[1]), "--jobs", "2"]) == 0
    one, two = ([(r["task"], r["accuracy"], r["curve"]) for r in read(file)] for file in files)
    assert one == two and [task for task, *_ in two] == ["palindrome", "stack"]


def test_jobs_share_a_budget(on_cpu, monkeypatch, capsys):
    """Of three runs by two, the first makes room for the last one; the others may take it all."""
    clock, shares = [0.0], []

    class Pool(contextlib.nullcontext):
        def __init__(self, jobs, context):
            super().__init__(self)
            assert jobs == 2 and context.get_start_method() == "spawn"

        def submit(self, function, setting, device, deadline, eager):
            shares.append(deadline - clock[0])
            clock[0] += 10
            future = Future()
            future.set_result("Traceback: broken")
            return future

    monkeypatch.setattr(cli, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    argv = ["run", "--task", "stack", "--length", "256", "--budget", "300", "--jobs", "2"]
    assert cli.main(argv) == 1
    assert shares == [150, 290, 280]
    assert capsys.readouterr().out.count("NOT TRAINED\nTraceback: broken") == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--jobs", "0"], "--jobs is 0, want at least 1"),
        (["--length", "15"], "length is 15, want 4 to 1048576, a multiple of 2"),
        (["--task", "mqar", "--length", "18"], "length is 18, want 4 to 16380, a multiple of 4"),
        (["--task", "stack", "--length", "2"], "length is 2, want 4 to 1048576"),
        (["--tokens", "100"], "tokens is 100, want at least the length, 256"),
        (["--steps", "0"], "--steps is 0, want at least 1"),
        (["--budget", "-3"], "--budget is -3.0, want at least 1"),
        (["--lr", "1e-3", "0"], "--lr is 0, want more than 0"),
        (["--mixer", "mamba"], "invalid choice: 'mamba'"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["run", *argv])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def make_row(mixer="kda", length=1024, accuracy=1.0, exact=1.0, **changes):
    row = {"task": "mqar", "mixer": mixer, "length": length, "lr": 1e-3, "seed": 0}
    row |= {"max_steps": 20_000, "tokens": 32_768, "steps": 3000, "seconds": 12.5, "stop": "solved"}
    row |= {"accuracy": accuracy, "exact": exact, "gpu": H200, "torch": "2.11.0", "git": "abc1234"}
    return row | {"date": "2026-11-23", "curve": [[1000, 0.5], [2000, 0.99], [3000, 1]]} | changes


def test_replace(tmp_path):
    path = tmp_path / "h200.jsonl"
    for row in (make_row(), make_row(lr=5e-4), make_row(length=256), make_row("scalar")):
        assert report.replace(path, row)
    assert report.replace(path, make_row(accuracy=0.9))
    assert not report.replace(path, make_row(accuracy=0.1, stop="budget"))
    assert len(read(path)) == 4 and make_row(accuracy=0.9) in read(path)
    with pytest.raises(ValueError, match="row has the columns"):
        report.replace(path, {"task": "mqar"})


def test_table():
    """The best run of each cell; 100 only where nothing is wrong; a star for a spent budget."""
    rows = [
        make_row(accuracy=0.99996, exact=0.98),
        make_row(accuracy=0.7, lr=5e-4),
        make_row("softmax", 256, 0.5, 0.0, stop="budget", curve=[[250, 0.5]]),
        make_row("softmax", 512),
    ]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in report.table(rows)]
    assert lines[0][2:] == ["256", "512", "1024", "2048", "steps to 99% at 1024"]
    mqar = {line[1]: line[2:] for line in lines if line[0] == "mqar"}
    assert mqar["KDA"] == ["-", "-", "99.9 (98.0)", "-", "2,000"]
    assert mqar["softmax attention"] == ["50.0 (0.0)\\*", "100 (100)", "-", "-", "-"]
    assert mqar["paper: GDN"] == ["100", "100", "78.7", "29.1", "-"]
    assert "KDA, one gate per head" not in mqar
    assert [line[1] for line in lines if line[0] == "stack"] == [
        "paper: KDA", "paper: GDN", "paper: Mamba2"
    ]  # fmt: skip


def test_what_is_in_the_repository():
    """The README has its markers and shows the results that are there."""
    text = (report.FOLDER / "README.md").read_text("utf-8")
    assert report.BLOCK.search(text)
    for file in (report.FOLDER / "results").glob("*.jsonl"):
        for line in file.read_text("utf-8").splitlines():
            assert set(json.loads(line)) == set(report.COLUMNS)
