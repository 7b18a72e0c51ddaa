"""The training step of a whole model: both models are the same one, and its costs are counted."""

from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_step
from benchmarks.guard import disagreement
from benchmarks.ops import OPS
from benchmarks.providers import reference
from kimi_linear.info import parameter_counts

CPU = torch.device("cpu")
TOY = {"B": 2, "T": 70, "L": 4, "D": 32, "H": 2, "K": 16, "E": 12, "F": 16, "R": 16, "vocab": 64}
OP = next(op for op in OPS if (op.name, op.mode) == ("model", "train_step"))


@pytest.fixture(scope="module")
def x():
    return model_step.inputs(TOY, torch.float32, CPU)


@pytest.mark.skipif(find_spec("fla") is not None, reason="with fla, native needs a GPU")
def test_native_computes_the_same(x):
    ours, native = model_step.ours(x)(), model_step.native(x)()
    assert ours[0].item() == pytest.approx(4.16, abs=0.1)  # log 64
    assert all(t.abs().max() > 0 for t in ours)
    assert disagreement(native, ours) < 1e-4


def test_reference_computes_the_same(x):
    """On a CPU ours is the reference; in bf16 it is what `check` compares."""
    rounded = model_step.inputs(TOY | {"E": 8}, torch.bfloat16, CPU)
    exact = {n: t.float() if t.is_floating_point() else t for n, t in rounded.items()}
    assert disagreement(model_step.ours(rounded)(), reference(model_step.ours)(exact)()) < 0.05


def test_a_call_leaves_no_gradient(x):
    call = model_step.ours(x)
    assert disagreement(call(), call()) < 1e-5  # else they would have added up


def test_models_share_the_weights(x):
    model = model_step.on_weights(model_step.config(TOY), x)
    assert model.training
    for name, p in model.named_parameters():
        assert p.data_ptr() == x[name].data_ptr() and p.requires_grad, name


def test_flops():
    """Against products counted as they are called, at a size where the chunks of KDA are little."""
    shape = TOY | {"B": 1, "T": 64, "D": 256, "F": 256, "vocab": 512}
    call = model_step.ours(model_step.inputs(shape, torch.float32, CPU))
    with FlopCounterMode(display=False) as counted:
        call()
    assert OP.flops(shape) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_bytes(x):
    assert OP.bytes(TOY) == 2 * sum(t.numel() * 2 for t in model_step.weights(x).values())


def test_declared_shape():
    """6.4 G parameters in bf16 and their gradients fit on one GPU of 80 GB."""
    (shape,) = OP.shapes
    config = model_step.config(shape)
    assert config.layer_types == 3 * ["linear_attention"] + ["full_attention"]
    assert config.mlp_layer_types == ["dense"] + 3 * ["sparse"]
    assert (config.intermediate_size, config.qk_head_dim) == (9216, 192)
    assert parameter_counts(config)["total"] == pytest.approx(6.4e9, rel=0.02)
    assert OP.flops(shape) / 690e12 == pytest.approx(29e-3, rel=0.05)
