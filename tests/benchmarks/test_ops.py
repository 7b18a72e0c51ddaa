"""What `benchmarks/ops.py` declares: guards that exist, and costs that agree with real tensors."""

import pytest
import torch

from benchmarks.inputs import DTYPE
from benchmarks.ops import OPS
from benchmarks.results import ROOT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOY = {"B": 64, "T": 20, "H": 2, "K": 64, "V": 64, "W": 4}
TOY |= {"L": 4, "D": 32, "E": 12, "F": 16, "R": 16, "vocab": 64, "S": 37, "N": 3}
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.mode}")


def size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_names_are_unique():
    assert len({(op.name, op.mode) for op in OPS}) == len(OPS)


@each_op
def test_declaration(op):
    assert list(ROOT.glob(op.tests)), "no test guards it"
    assert op.timer == "process" or {"ours", "reference"} <= set(op.providers)
    open_batch = {"B"} if op.timer == "largest" else set()
    assert set(op.check or {}) - open_batch <= set(op.shapes[0])
    assert not open_batch & set(op.shapes[0])
    assert not open_batch or all(p.cache for p in op.providers.values() if p.fits(op.shapes[0]))
    assert all(set(shape) == set(op.shapes[0]) for shape in op.shapes)


@pytest.mark.parametrize(
    "op",
    [op for op in OPS if op.timer != "error" and op.name not in ("model", "trainer")],
    ids=lambda op: f"{op.name}-{op.mode}",
)
def test_bytes(op):
    """Inputs once and outputs once, to the few parameters of the gate."""
    shape = {letter: TOY[letter] for letter in op.shapes[0]}
    x = op.inputs(shape, DTYPE, DEVICE)
    outputs = op.providers["ours"].build(x)()
    moved = size(*x.values(), *outputs)
    if "do" in x:  # the backward pass reads the inputs of the forward pass again
        moved += size(*x.values()) - size(x["do"])
    if op.name == "kda_step":
        moved += size(x["conv_state"])
    if (op.name, op.mode) == ("rms_norm", "train"):  # that reads the sum, and has one gradient
        moved -= size(x["x"], x["residual"])
    assert op.bytes(shape) == pytest.approx(moved, rel=0.02)


def test_flops():
    """The recurrence is cheaper than its chunk form, which is cheaper than twice as much."""
    flops = {(op.name, op.mode): op.flops for op in OPS}
    shape = {"B": 1, "T": 1, "H": 1, "K": 128, "V": 128, "W": 4}
    chunk, step = flops["kda", "forward"](shape), flops["kda_step", "decode"](shape)
    assert step < chunk < 2 * step
    assert flops["kda", "train"](shape) == 3 * chunk


@each_op
def test_inputs_are_drawn_alike(op):
    shape = {letter: TOY[letter] for letter in op.shapes[0]} | {"B": 1}
    a, b = (op.inputs(shape, DTYPE, DEVICE) for _ in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(t.isfinite().all() for t in a.values())


def test_gate_is_drawn_as_a_model_starts():
    x = OPS[0].inputs({"B": 1, "T": 1, "H": 500, "K": 128, "V": 1}, DTYPE, DEVICE)
    A, dt = x["A_log"].exp(), torch.nn.functional.softplus(x["dt_bias"])
    assert 1 <= A.min() < 2 < 15 < A.max() <= 16
    assert dt.min().item() == pytest.approx(1e-3, rel=0.05)
    assert dt.max().item() == pytest.approx(1e-1, rel=0.05)
