"""Which implementation runs: the context manager, the environment variable, the refusals."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kimi_kernels
from kimi_kernels import backend, chunk_kda, dispatch, gated_rms_norm
from tests.kernels.kda_cases import make_inputs

x, w = torch.ones(3, 8), torch.ones(8)


@pytest.fixture(autouse=True)
def start_from_auto(monkeypatch):
    """Whatever KIMI_KERNELS_BACKEND the tests themselves run under."""
    monkeypatch.setattr(dispatch, "_backend", "auto")


@pytest.fixture
def ran(monkeypatch):
    """The implementations of gated_rms_norm that ran, in order."""
    from kimi_kernels import gated_norm, gated_norm_triton

    names = []

    def spy(module, attribute, name):
        original = getattr(module, attribute)

        def noted(*args):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(module, attribute, noted)

    spy(gated_norm, "gated_rms_norm_ref", "reference")
    spy(gated_norm_triton, "gated_rms_norm_triton", "triton")
    return names


def test_auto_is_the_reference_on_a_cpu(ran):
    gated_rms_norm(x, x, w)
    with backend("auto"):
        gated_rms_norm(x, x, w)
    assert ran == ["reference", "reference"]


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu(ran):
    gated_rms_norm(x.cuda(), x.cuda(), w.cuda())
    assert ran == ["triton"]


def test_float64_has_the_reference_only():
    with backend("triton"), pytest.raises(ValueError, match=r"^backend is triton, but .* float64"):
        gated_rms_norm(x.double(), x.double(), w)


def test_backends_nest_and_are_restored(ran):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = [t.to(device) for t in (x, x, w)]
    with backend("triton"):
        gated_rms_norm(*args)
        with backend("reference"):
            gated_rms_norm(*args)
        gated_rms_norm(*args)
    assert ran == ["triton", "reference", "triton"]
    assert dispatch._backend == "auto"


def test_an_exception_restores_the_backend():
    with pytest.raises(KeyError), backend("triton"):
        raise KeyError
    assert dispatch._backend == "auto"


@pytest.mark.parametrize("name", ["", "Triton", "cuda", None])
def test_unknown_backend(name):
    message = r"^backend must be auto, triton or reference, got"
    with pytest.raises(ValueError, match=message), backend(name):
        pass
    assert dispatch._backend == "auto"


def test_forced_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend("triton"), pytest.raises(ValueError, match=r"backend is triton.* on cpu"):
        gated_rms_norm(x, x, w)


def test_forced_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    gated_rms_norm(x, x, w)
    with backend("triton"), pytest.raises(ValueError, match=r"triton package is not installed"):
        gated_rms_norm(x, x, w)


def test_bad_input_is_refused_before_the_backend():
    kda = make_inputs(3)
    with backend("triton"), pytest.raises(ValueError, match=r"^k\b"):
        chunk_kda(**(kda | {"k": kda["q"][..., :2]}))


@pytest.mark.parametrize("value", [None, "auto", "triton", "reference"])
def test_environment_variable(value, monkeypatch):
    monkeypatch.delenv("KIMI_KERNELS_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("KIMI_KERNELS_BACKEND", value)
    assert runpy.run_path(dispatch.__file__)["_backend"] == (value or "auto")


def test_environment_variable_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cuda")
    message = r"^KIMI_KERNELS_BACKEND must be auto, triton or reference, got 'cuda'$"
    with pytest.raises(ValueError, match=message):
        runpy.run_path(dispatch.__file__)


def test_environment_variable_in_a_new_process():
    """It forces the ops, and importing them does not import triton."""
    code = """if True:
        import sys, torch, kimi_kernels
        assert "triton" not in sys.modules
        try:
            q, latent, w = (torch.zeros(s) for s in ((1, 1, 1, 3), (1, 1, 2), (4, 2)))
            kimi_kernels.latent_attention(q, latent, w, scale=1.0)
        except ValueError as error:
            print(error)
    """
    env = os.environ | {"PYTHONPATH": str(Path(kimi_kernels.__file__).parents[1])}
    env["KIMI_KERNELS_BACKEND"] = "triton"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message = "backend is triton, but the expanded form of latent_attention has no Triton kernel"
    assert done.stdout.strip() == f"{message}: use auto or reference"
