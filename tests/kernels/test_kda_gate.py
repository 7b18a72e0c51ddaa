"""The activations in front of KDA, and fused_kda, which holds them."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from kimi_kernels import chunk_kda, fused_kda, kda_gate, l2norm, recurrent_kda
from tests.helpers import assert_as_good_as
from tests.kernels.kda_cases import doubled, gradients, make_raw, make_state

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_bound = pytest.mark.parametrize("lower_bound", [None, -5.0, -0.25])


def activated(q, k, v, f, b, A_log, dt_bias, lower_bound=None):
    """Arguments of `chunk_kda`, with every activation written out by hand."""
    HV, K = f.shape[-2:]
    x = f + dt_bias.view(HV, K)
    A = A_log.exp()[:, None]
    if lower_bound is None:
        g = -A * torch.log1p(torch.exp(x))
    else:
        g = lower_bound / (1 + torch.exp(-A * x))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    return {"q": q, "k": k, "v": v, "g": g, "beta": 1 / (1 + torch.exp(-b))}


# ---- l2norm ------------------------------------------------------------------------------------


def test_l2norm_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]], dtype=torch.float64)
    want = [[3 / math.sqrt(25 + 1e-6), 4 / math.sqrt(25 + 1e-6)], [0, 0], [0, 1 / math.sqrt(2)]]
    want = torch.tensor(want, dtype=torch.float64)
    assert_as_good_as("l2norm", l2norm(x), want, want)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        l2norm(torch.tensor([[3, 4]]))


@each_dtype
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])  # the squares of 300 overflow fp16
def test_l2norm_dtypes(dtype, size):
    x = (size * torch.randn(2, 5, 3, 64)).to(dtype)
    gold = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert_as_good_as("l2norm", l2norm(x), gold.to(dtype), gold)


def test_l2norm_gradient():
    x = torch.randn(4, 6, dtype=torch.float64)
    x[0] = 0
    assert gradcheck(l2norm, x.requires_grad_())


# ---- the gate ----------------------------------------------------------------------------------


def test_unbounded_gate_by_hand():
    """g = -exp(A_log[h]) softplus(f + dt_bias[h, k]): one A per head, one bias per channel."""
    f = torch.tensor([[[[1.0, -2.0, 0.5], [0.0, 3.0, -30.0]]]], dtype=torch.float64)
    A_log = torch.tensor([0.3, -1.0], dtype=torch.float64)
    dt_bias = torch.tensor([0.1, 0.2, 0.3, -0.4, 0.5, 0.6], dtype=torch.float64)
    want = torch.empty_like(f)
    for h in range(2):
        for k in range(3):
            x = f[0, 0, h, k].item() + dt_bias[3 * h + k].item()
            want[0, 0, h, k] = -math.exp(A_log[h].item()) * math.log1p(math.exp(x))
    assert_as_good_as("g", kda_gate(f, A_log, dt_bias), want, want)


def test_bounded_gate_by_hand():
    """g = lower_bound sigmoid(exp(A_log[h]) (f + dt_bias[h, k])): A is inside."""
    f = torch.tensor([[[[1.0, -2.0, 0.5], [0.0, 3.0, -30.0]]]], dtype=torch.float64)
    A_log = torch.tensor([0.3, -1.0], dtype=torch.float64)
    dt_bias = torch.tensor([0.1, 0.2, 0.3, -0.4, 0.5, 0.6], dtype=torch.float64)
    want = torch.empty_like(f)
    for h in range(2):
        for k in range(3):
            x = f[0, 0, h, k].item() + dt_bias[3 * h + k].item()
            want[0, 0, h, k] = -5 / (1 + math.exp(-math.exp(A_log[h].item()) * x))
    assert_as_good_as("g", kda_gate(f, A_log, dt_bias, -5.0), want, want)


@each_bound
@each_dtype
def test_gate_dtypes(dtype, lower_bound):
    """Computed and returned in fp32 or better, whatever comes in."""
    f, A_log, dt_bias = torch.randn(2, 7, 3, 16).to(dtype), torch.rand(3), torch.randn(48)
    gold = kda_gate(f.double(), A_log.double(), dt_bias.double(), lower_bound)
    got = kda_gate(f, A_log, dt_bias, lower_bound)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as("g", got, gold.to(got.dtype), gold)


@each_bound
def test_gate_range(lower_bound):
    """Finite and <= 0 for any projection, and above its bound if it has one."""
    f = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 3000.0]).view(1, 1, 1, 7)
    g = kda_gate(f, torch.zeros(1), torch.zeros(7), lower_bound)
    assert torch.isfinite(g).all() and (g <= 0).all()
    if lower_bound is None:
        assert g[..., -1] == -3000 and g[..., 3] == pytest.approx(-math.log(2))
    else:
        assert (g >= lower_bound).all() and g[..., 3] == pytest.approx(lower_bound / 2)


@each_bound
def test_gate_gradient(lower_bound):
    f, A_log, dt_bias = torch.randn(1, 3, 2, 4), torch.randn(2), torch.randn(8)
    leaves = [x.double().requires_grad_() for x in (f, A_log, dt_bias)]
    assert gradcheck(lambda f, A_log, dt_bias: kda_gate(f, A_log, dt_bias, lower_bound), leaves)


@pytest.mark.parametrize(
    "name, change",
    [
        ("A_log", {"A_log": torch.zeros(3)}),
        ("A_log", {"A_log": torch.zeros(1, 2)}),
        ("dt_bias", {"dt_bias": torch.zeros(2)}),
        ("dt_bias", {"dt_bias": torch.zeros(2, 4)}),
        ("lower_bound", {"lower_bound": 0.0}),
        ("lower_bound", {"lower_bound": 5.0}),
        ("lower_bound", {"lower_bound": -math.inf}),
        ("lower_bound", {"lower_bound": math.nan}),
    ],
)
def test_gate_refuses(name, change):
    good = {"f": torch.zeros(1, 3, 2, 4), "A_log": torch.zeros(2), "dt_bias": torch.zeros(8)}
    kda_gate(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        kda_gate(**(good | change))


# ---- fused_kda ---------------------------------------------------------------------------------


@each_bound
@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 63, 64, 65, 130])
def test_fused_is_chunk_on_activated_inputs(T, lower_bound):
    raw, state = make_raw(T, H=2, HV=4), make_state(1, 4, 6, 5)
    got = fused_kda(**raw, lower_bound=lower_bound, initial_state=state, output_final_state=True)
    inputs = activated(**raw, lower_bound=lower_bound)
    for op in (chunk_kda, recurrent_kda):
        want = op(**inputs, initial_state=state, output_final_state=True)
        for name, a, b in zip("oS", got, want, strict=True):
            assert_as_good_as(name, a, b, b)


@each_bound
@pytest.mark.parametrize("T", [15, 70])
def test_fused_gradients_are_those_of_chunk(T, lower_bound):
    raw = make_raw(T) | {"initial_state": make_state(1, 2, 6, 5)}
    do, dS = torch.randn(1, T, 2, 5).double(), torch.randn(1, 2, 6, 5).double()

    def by_hand(*, initial_state, output_final_state, **raw):
        inputs = activated(**raw, lower_bound=lower_bound)
        return recurrent_kda(
            **inputs, initial_state=initial_state, output_final_state=output_final_state
        )

    got = gradients(fused_kda, raw, do, dS, lower_bound=lower_bound)
    want = gradients(by_hand, raw, do, dS)
    for name in want:
        assert_as_good_as(name, got[name], want[name], want[name])


@each_bound
@pytest.mark.parametrize("T", [10, 130])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fused_dtypes(dtype, T, lower_bound):
    """q, k, gate and beta stay in fp32 inside, so the result is right up to its own rounding."""
    raw = make_raw(T, K=16, V=12, dtype=dtype)
    state = make_state(1, 2, 16, 12, dtype=torch.float32)
    options = {"lower_bound": lower_bound, "output_final_state": True}
    gold = fused_kda(**doubled(raw), initial_state=state.double(), **options)
    o, S = fused_kda(**raw, initial_state=state, **options)
    assert_as_good_as("o", o, gold[0].to(dtype), gold[0])
    assert_as_good_as("S", S, gold[1].float(), gold[1])


@each_bound
@pytest.mark.parametrize("T", [10, 130])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fused_gradient_dtypes(dtype, T, lower_bound):
    raw = make_raw(T, K=16, V=12, dtype=dtype)
    raw["initial_state"] = make_state(1, 2, 16, 12, dtype=torch.float32)
    do, dS = torch.randn(1, T, 2, 12).to(dtype).double(), torch.randn(1, 2, 16, 12)

    def composed(*, initial_state, output_final_state, q, k, v, f, b, A_log, dt_bias):
        inputs = activated(q.float(), k.float(), v.float(), f.float(), b.float(), A_log, dt_bias,
                           lower_bound)  # fmt: skip
        states = {"initial_state": initial_state, "output_final_state": output_final_state}
        o, S = recurrent_kda(**inputs, **states)
        return o.to(dtype), S

    got = gradients(fused_kda, raw, do, dS, lower_bound=lower_bound)
    ref = gradients(composed, raw, do, dS)
    gold = gradients(fused_kda, doubled(raw), do, dS, lower_bound=lower_bound)
    for name in gold:
        assert_as_good_as(name, got[name], ref[name], gold[name])
    for name, x in raw.items():
        assert got[f"d{name}"].dtype == x.dtype


@pytest.mark.parametrize("T", [10, 130])
@pytest.mark.parametrize("A_log", [0.0, 5.0, 8.0])  # a factor of 3000 in front of the softplus
def test_fused_is_finite_for_strong_gates_and_zero_vectors(A_log, T):
    raw = make_raw(T, dtype=torch.float32)
    raw["A_log"] = torch.full_like(raw["A_log"], A_log)
    raw["q"][:, 3], raw["k"][:, 4], raw["v"][:, 5] = 0, 0, 0
    raw["initial_state"] = make_state(1, 2, 6, 5, dtype=torch.float32)
    do, dS = torch.randn(1, T, 2, 5), torch.randn(1, 2, 6, 5)
    for name, x in gradients(fused_kda, raw, do, dS).items():
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("T", [0, 5, 70])
def test_fused_modifies_nothing(T):
    raw = make_raw(T, dtype=torch.float32)
    raw["initial_state"] = make_state(1, 2, 6, 5, dtype=torch.float32)
    before = {name: x.clone() for name, x in raw.items()}
    _, S = fused_kda(**raw, output_final_state=True)
    S.zero_()
    for name, x in raw.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("T", [5, 70])
def test_fused_non_contiguous(T):
    raw = make_raw(T, H=2)
    want = fused_kda(**raw, output_final_state=True)
    views = {n: x.mT.contiguous().mT if x.ndim > 1 else x.repeat(2, 1).T.flatten()[::2]
             for n, x in raw.items()}  # fmt: skip
    for name, a, b in zip("oS", fused_kda(**views, output_final_state=True), want, strict=True):
        assert_as_good_as(name, a, b, b)


@each_dtype
@pytest.mark.parametrize("T", [0, 5, 70])
def test_fused_output_dtypes(dtype, T):
    raw = make_raw(T, H=2, HV=4, dtype=dtype)
    o, S = fused_kda(**raw, output_final_state=True)
    assert (o.dtype, o.shape) == (dtype, (1, T, 4, 5))
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert S.shape == (1, 4, 6, 5)
    assert fused_kda(**raw)[1] is None
