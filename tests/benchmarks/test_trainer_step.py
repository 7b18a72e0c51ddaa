"""The optimizer step of a Trainer: it is the bare one, and its thread ends with the call."""

import gc
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_step, trainer_step
from benchmarks.guard import disagreement
from benchmarks.ops import OPS

CPU = torch.device("cpu")
TOY = {"B": 1, "T": 64, "L": 4, "D": 32, "H": 2, "K": 16, "E": 12, "F": 16, "R": 16, "vocab": 64}
OP = next(op for op in OPS if op.name == "trainer")


@pytest.fixture(scope="module")
def x():
    return model_step.inputs(TOY, torch.float32, CPU)


def test_both_compute_the_same_at_every_step(x):
    before = {name: t.clone() for name, t in x.items()}
    call, bare = trainer_step.trainer(x), trainer_step.bare(x)
    want = bare()
    assert want[0].item() == pytest.approx(4.16, abs=0.1)  # log 64
    for _ in range(11):  # past the first log
        assert disagreement(call(), want) < 1e-5
    assert disagreement(bare(), want) < 1e-5
    assert all(torch.equal(t, x[name]) for name, t in before.items())


def test_autocast(x):
    dense = model_step.inputs(TOY | {"E": 8}, torch.bfloat16, CPU)
    assert disagreement(trainer_step.autocast_trainer(dense)(), trainer_step.bare(dense)()) < 0.05


def test_the_thread_ends_with_the_call(x):
    before = threading.active_count()
    call = trainer_step.trainer(x)
    call()
    assert threading.active_count() > before
    del call
    gc.collect()
    assert threading.active_count() == before


def test_errors_come_out(x):
    call = trainer_step.trainer(x | {"ids": x["ids"] + TOY["vocab"]})
    with pytest.raises(IndexError):
        call()


def test_costs(x):
    shape = TOY | {"T": 512, "D": 256, "F": 256, "vocab": 512}
    call = trainer_step.bare(model_step.inputs(shape, torch.float32, CPU))
    with FlopCounterMode(display=False) as counted:
        call()
    assert OP.flops(shape) == pytest.approx(counted.get_total_flops(), rel=0.1)
    size = 2 * sum(t.numel() for t in model_step.weights(x).values())
    assert OP.bytes(TOY) == 6 * size
