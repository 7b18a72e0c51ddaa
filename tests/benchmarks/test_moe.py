"""The routed experts: everyone computes the same, and their cost is counted."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import inputs
from benchmarks import providers as by
from benchmarks.guard import disagreement
from benchmarks.inputs import DTYPE
from benchmarks.ops import OPS
from benchmarks.providers import forward, reference, train

CPU = torch.device("cpu")
TOY = {"B": 2, "T": 15, "D": 32, "E": 12, "F": 16}
OP = {op.mode: op for op in OPS if op.name == "moe"}
DTYPES = pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (DTYPE, 0.02)])


def drawn(mode, dtype):
    return (inputs.moe_train_inputs if mode is train else inputs.moe_inputs)(TOY, dtype, CPU)


@DTYPES
@pytest.mark.parametrize("mode", [forward, train])
@pytest.mark.parametrize("theirs", [by.grouped_mm, by.batched_mm])
def test_transformers_computes_the_same(theirs, mode, dtype, error):
    x = drawn(mode, dtype)
    outputs, ours = mode(theirs)(x)(), mode(by.our_experts)(x)()
    assert [t.dtype for t in outputs] == [t.dtype for t in ours]
    assert disagreement(outputs, ours) < error


@pytest.mark.parametrize(
    "theirs, product",
    [(by.grouped_mm, "torch.nn.functional.grouped_mm"), (by.batched_mm, "torch.bmm")],
)
def test_transformers_runs_what_was_asked_for(theirs, product, monkeypatch):
    x, calls = inputs.moe_inputs(TOY, DTYPE, CPU), []
    module, _, name = product.rpartition(".")
    run = getattr(sys.modules[module], name)
    monkeypatch.setattr(product, lambda *args, **options: calls.append(1) or run(*args, **options))
    forward(theirs)(x)()
    assert len(calls) == 2


class Scattermoe:
    """What the functions of the library compute; it needs a GPU."""

    @staticmethod
    def flatten_sort_count(index, num_experts):
        expert, slot = index.flatten().sort()
        return expert, slot, expert.bincount(minlength=num_experts).cumsum(-1)

    @staticmethod
    def parallel_linear(x, w, k, expert, slot, _, gates=None, grouped_in=False, grouped_out=False):
        """Rows of the input and of the output are sorted by expert (`grouped`), or in order."""
        rows = x if grouped_in else x[slot // k]
        y = torch.einsum("si,sio->so", rows, w[expert])
        y = y if grouped_out else torch.zeros_like(y).index_copy(0, slot, y)
        return y if gates is None else (gates[:, None] @ y.view(*gates.shape, -1)).squeeze(1)


@DTYPES
@pytest.mark.parametrize("mode", [forward, train])
def test_scattermoe_is_called_as_it_wants(mode, dtype, error, monkeypatch):
    monkeypatch.setitem(sys.modules, "scattermoe", Scattermoe)
    x = drawn(mode, dtype)
    assert disagreement(mode(by.scattermoe)(x)(), reference(mode(by.our_experts))(x)()) < error


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_flops(mode):
    """Against products counted as they are called."""
    call = OP[mode].providers["reference"].build(OP[mode].inputs(TOY, torch.float32, CPU))
    with FlopCounterMode(display=False) as counted:
        call()
    assert OP[mode].flops(TOY) == counted.get_total_flops()


def test_declared_costs():
    """In weights of an expert, 14 MB: 8 at one token, nearly all from 512 on."""
    decode, long = OP["decode"], OP["forward"].shapes[-1]
    expert = 3 * 2304 * 1024 * 2
    hits = [decode.bytes(s) / expert for s in decode.shapes]
    assert hits == pytest.approx([8, 57.4, 163.3], rel=0.01)
    assert OP["forward"].bytes(long) / expert == pytest.approx(256, rel=0.03)
    assert OP["forward"].flops(long) == pytest.approx(0.928e12, rel=0.01)
    assert OP["train"].flops(long) == 3 * OP["forward"].flops(long)


def test_routing():
    """Different experts per token, all as likely; as many are hit as the bytes say."""
    shape = TOY | {"T": 2000, "D": 1, "E": 256, "F": 1}
    x = inputs.moe_inputs(shape, DTYPE, CPU)
    index, weights = x["index"], x["weights"]
    assert index.shape == weights.shape == (4000, inputs.TOP_K)
    assert all(row.unique().numel() == inputs.TOP_K for row in index[:100])
    counts = index.flatten().bincount(minlength=256)
    assert counts.min() > 70 and counts.max() < 190  # mean 125, deviation 11
    assert torch.allclose(weights.sum(-1), torch.tensor(2.446))
    hit = [index[i : i + 8].unique().numel() for i in range(0, 4000, 8)]
    assert sum(hit) / 500 == pytest.approx(57.4, rel=0.01)


def test_other_tokens():
    x = inputs.moe_inputs(TOY, DTYPE, CPU)
    first, second = (inputs.other_tokens(x, i) for i in (0, 1))
    assert list(first) == list(x) and all(torch.equal(first[name], x[name]) for name in x)
    assert not torch.equal(second["index"], x["index"])
    assert all(second[name] is x[name] for name in ("gate_up", "down"))
