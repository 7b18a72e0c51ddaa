"""The Triton forward of KDA over time: packed rows, segments, causality, a carried state."""

import itertools

import pytest
import torch

from kimi_kernels import backend, chunk_kda, fused_kda, recurrent_kda
from kimi_kernels.kda import chunk_fwd
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.kernels.kda_cases import (
    KERNEL_OPS,
    PARAMETERS,
    check_kernel,
    cumulative,
    doubled,
    here,
    kernel_inputs,
    kernel_raw,
    make_state,
    run,
    tokens,
)

CHUNK_OPS = [KERNEL_OPS[0], KERNEL_OPS[2]]  # what goes through chunks if it has 16 tokens
each_op = pytest.mark.parametrize("op, make", KERNEL_OPS)
each_chunk_op = pytest.mark.parametrize("op, make", CHUNK_OPS)
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


PAIRS = list(zip(KERNEL_DTYPES, [torch.int32, torch.int64, torch.int32], strict=False))


def states(N, HV=2, K=20, V=17):
    return make_state(N, HV, K, V, dtype=torch.float32).to(DEVICE)


def assert_equal(got, want):
    for name, a, b in zip("oS", got, want, strict=True):
        assert torch.equal(a, b), name


# ---- packed sequences --------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dtype, cu_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("lengths", [[0, 5, 0, 3, 0, 0], [9], [1, 1, 1]], ids=str)
def test_short_packed(op, make, lengths, cu_dtype, dtype):
    inputs = here(make(sum(lengths), HV=1, dtype=dtype))
    inputs["initial_state"] = states(len(lengths), 1)
    check_kernel(op, inputs, cu_seqlens=cumulative(lengths, cu_dtype).to(DEVICE))


@each_chunk_op
@pytest.mark.parametrize("dtype, cu_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("lengths", [[0, 5, 0, 64, 1, 70, 0], [0, 0, 17]], ids=str)
def test_packed(op, make, lengths, cu_dtype, dtype):
    inputs = here(make(sum(lengths), HV=1, dtype=dtype))
    inputs["initial_state"] = states(len(lengths), 1)
    check_kernel(op, inputs, cu_seqlens=cumulative(lengths, cu_dtype).to(DEVICE))


@pytest.mark.gpu
@each_op
@each_dtype
@pytest.mark.parametrize("lengths", [[0, 5, 0, 640, 1, 1300, 0], [1] * 300, [1000] * 3], ids=len)
def test_long_packed(op, make, lengths, dtype):
    inputs = here(make(sum(lengths), H=2, HV=4, K=128, V=128, dtype=dtype))
    inputs["initial_state"] = states(len(lengths), 4, 128, 128)
    check_kernel(op, inputs, cu_seqlens=cumulative(lengths).to(DEVICE))


@each_op
def test_packed_is_separate(op, make):
    """To the bit: nothing of a neighbour enters, and a chunk never spans two sequences."""
    lengths = [3, 0, 17, 2] if op is recurrent_kda else [70, 0, 17, 16]
    inputs, S = here(make(sum(lengths), dtype=torch.float32)), states(4)
    got = run("triton", op, inputs, initial_state=S, cu_seqlens=cumulative(lengths).to(DEVICE))
    ends = cumulative(lengths).tolist()
    outs = [
        run("triton", op, tokens(inputs, a, b), initial_state=S[n : n + 1])
        for n, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    assert_equal(got, (torch.cat([o for o, _ in outs], 1), torch.cat([x for _, x in outs])))


@each_op
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]], ids=str)
def test_only_empty_sequences_hand_their_states_on(op, make, lengths):
    S = states(len(lengths))
    inputs, cu = here(make(0, dtype=torch.float32)), cumulative(lengths).to(DEVICE)
    o, got = run("triton", op, inputs, initial_state=S, cu_seqlens=cu)
    assert o.shape == (1, 0, 2, 17)
    assert torch.equal(got, S)
    assert not run("triton", op, inputs, cu_seqlens=cu)[1].any()


@each_chunk_op
def test_slices_of_a_packed_row(op, make):
    inputs = here(make(90, dtype=torch.float32))
    wide = {n: x.repeat_interleave(2, 1) if x.ndim > 2 else x for n, x in inputs.items()}
    every_second = {n: x[:, ::2] if x.ndim > 2 else x for n, x in wide.items()}
    cu = cumulative([70, 20]).to(DEVICE)
    got, want = (run("triton", op, x, cu_seqlens=cu) for x in (every_second, inputs))
    assert_equal(got, want)


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("cu", [[0, 10, 5, 100], [7, 50, 1 << 40], [-5, 200, 300]], ids=str)
def test_wrong_cu_seqlens_read_nothing_outside(op, make, cu):
    """On a GPU their values cannot be checked without waiting for it."""
    inputs = here(make(100, dtype=torch.float32))
    run("triton", op, inputs, cu_seqlens=torch.tensor(cu, device=DEVICE))
    torch.cuda.synchronize()


# ---- segments ----------------------------------------------------------------------------------


@each_chunk_op
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("B, lengths", [(2, None), (1, [140, 0, 10, 70]), (1, [0, 64, 64, 0])])
def test_segments_change_no_bit(op, make, B, lengths, chunks, monkeypatch):
    """Of the scratch memory, which bounds the chunks that are in flight at once."""
    T = 140 if lengths is None else sum(lengths)
    inputs = here(make(T, B=B, HV=1, dtype=torch.float32))
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    options = {"initial_state": states(B if cu is None else len(lengths), 1), "cu_seqlens": cu}
    want = run("triton", op, inputs, **options)
    monkeypatch.setattr(chunk_fwd, "SCRATCH_TOKENS", chunks * 64)
    assert_equal(run("triton", op, inputs, **options), want)


@pytest.mark.parametrize("lengths", [[0, 0], [0, 70, 0, 0]], ids=str)
def test_empty_sequences_in_segments(lengths, monkeypatch):
    monkeypatch.setattr(chunk_fwd, "SCRATCH_TOKENS", 1)
    inputs = here(kernel_inputs(sum(lengths), HV=1, dtype=torch.float32))
    inputs["initial_state"] = S = states(len(lengths), 1)
    _, got = check_kernel(chunk_kda, inputs, cu_seqlens=cumulative(lengths).to(DEVICE))
    empty = torch.tensor(lengths) == 0
    assert torch.equal(got[empty], S[empty])


@each_dtype
@pytest.mark.parametrize("segment", [1 << 20, 256], ids=["one segment", "segments"])
@pytest.mark.parametrize("T, state", [(300, True), (257, False)])
def test_split_sequence(T, state, segment, dtype, monkeypatch):
    """Parts of a sequence at the same time; gates so weak that every part reaches the last."""
    monkeypatch.setattr(chunk_fwd, "count_parts", lambda x, chunks: 3)
    monkeypatch.setattr(chunk_fwd, "SCRATCH_TOKENS", segment)
    inputs = kernel_inputs(T, HV=1, dtype=dtype)
    inputs["g"] *= 1e-3
    inputs["beta"] *= 0.1
    inputs |= {"initial_state": states(1, 1)} if state else {}
    check_kernel(chunk_kda, here(inputs))


@pytest.mark.gpu
def test_few_heads_are_split(monkeypatch):
    calls = []
    split = chunk_fwd.Chunks.split_inter
    record = lambda *args: calls.append(args[3]) or split(*args)  # noqa: E731
    monkeypatch.setattr(chunk_fwd.Chunks, "split_inter", record)
    inputs = kernel_raw(20_000, HV=2, K=128, V=128, dtype=torch.bfloat16)
    inputs["f"] -= 8
    check_kernel(fused_kda, here(inputs))
    assert calls and calls[0] >= 4


# ---- time --------------------------------------------------------------------------------------


@each_op
@each_dtype
def test_later_tokens_change_no_bit(op, make, dtype):
    T, cuts = (20, (0, 9)) if op is recurrent_kda else (129, (0, 31, 63, 64))
    inputs = here(make(T, HV=1, dtype=dtype))
    o, _ = run("triton", op, inputs)
    for t in cuts:
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in set(inputs) - set(PARAMETERS):
            noise = torch.randn_like(inputs[name][:, t + 1 :])
            match name:
                case "g":
                    noise = -3000 * noise.abs()
                case "k":
                    noise /= noise.norm(dim=-1, keepdim=True)
                case "beta":
                    noise = noise.sigmoid()
            changed[name][:, t + 1 :] = noise
        o2, _ = run("triton", op, changed)
        assert torch.equal(o[:, : t + 1], o2[:, : t + 1]), t
        assert not torch.equal(o[:, t + 1 :], o2[:, t + 1 :]), t


@each_dtype
@pytest.mark.parametrize("make", [kernel_inputs, kernel_raw])
def test_pieces_of_any_form(make, dtype):
    """Chunks, tokens and chunks again, each from the state of the last: as good as all at once."""
    inputs = here(make(100, HV=1, dtype=dtype))
    S = first = states(1, 1)
    outs = []
    for i, (a, b) in enumerate(itertools.pairwise([0, 33, 40, 80, 80, 81, 100])):
        op = fused_kda if make is kernel_raw else (chunk_kda, recurrent_kda)[i % 2]
        o, S = run("triton", op, tokens(inputs, a, b), initial_state=S)
        outs.append(o)
    op = fused_kda if make is kernel_raw else recurrent_kda
    ref = run("reference", op, inputs, initial_state=first)
    gold = run("reference", op, doubled(inputs), initial_state=first.double())
    for name, a, b, c in zip("oS", (torch.cat(outs, 1), S), ref, gold, strict=True):
        assert_as_good_as(name, a, b, c, dtype)


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
@each_op
def test_more_elements_than_2_to_31(op, make):
    """The last tokens are to the bit those from the state that the first ones leave."""
    T, head, H, K = 140_000, 130_048, 128, 128  # head is whole chunks, head * H * K < 2^31
    assert head % 64 == 0 and head * H * K < 2**31 < T * H * K
    inputs = {}
    for n, x in make(1, H=1, HV=1, K=1, V=1).items():
        shape = {"A_log": (H,), "dt_bias": (H * K,)}.get(n, (1, T, H, K)[: x.ndim])
        inputs[n] = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    if "g" in inputs:
        inputs["g"].abs_().neg_()
        inputs["beta"].sigmoid_()
        inputs["k"] /= inputs["k"].norm(dim=-1, keepdim=True)
    zeros = torch.zeros(1, H, K, K, device=DEVICE)  # all three runs are then of one compilation
    o, S = run("triton", op, inputs, initial_state=zeros)
    o1, S1 = run("triton", op, tokens(inputs, 0, head), initial_state=zeros)
    assert torch.isfinite(S).all() and torch.equal(o[:, :head], o1)
    del o1
    o2, S2 = run("triton", op, tokens(inputs, head, T), initial_state=S1)
    assert torch.equal(o[:, head:], o2) and torch.equal(S, S2)


@pytest.mark.gpu
@each_op
def test_more_rows_than_a_grid_axis_holds(op, make):
    """65,536 pairs of a sequence and a head."""
    inputs = here(make(16, B=2100, H=1, HV=32, K=16, V=16, dtype=torch.bfloat16))
    last = {n: x if n in PARAMETERS else x[-1:] for n, x in inputs.items()}
    got, want = run("triton", op, inputs), run("triton", op, last)
    assert_equal([x[-1:] for x in got], want)


# ---- what the host may not do ------------------------------------------------------------------


@pytest.fixture
def no_sync():
    """A function that runs `f` where waiting for the GPU is an error."""

    def call(f):
        f()  # compiled before
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return f()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("lengths", [None, [70, 0, 5, 25]], ids=str)
def test_no_host_sync(op, make, lengths, no_sync):
    inputs = here(make(100, dtype=torch.bfloat16))
    cu = None if lengths is None else cumulative(lengths).to(DEVICE)
    S = states(1 if cu is None else len(lengths))
    no_sync(lambda: run("triton", op, inputs, initial_state=S, cu_seqlens=cu))


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("T", [5, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph(op, make, T, packed):
    """Replayed on other inputs, with other lengths: to the bit what an eager call gives."""
    first, second = (here(make(T, K=16, V=16, dtype=torch.bfloat16)) for _ in range(2))
    S = states(3 if packed else 1, K=16, V=16)
    cu = [None, None]
    if packed:
        cu = [cumulative(x).to(DEVICE) for x in ([T - 3, 0, 3], [1, T - 2, 1])]
    want = run("triton", op, second, initial_state=S, cu_seqlens=cu[1])
    run("triton", op, first, initial_state=S, cu_seqlens=cu[0])
    graph = torch.cuda.CUDAGraph()
    with backend("triton"), torch.cuda.graph(graph):
        got = op(**first, initial_state=S, output_final_state=True, cu_seqlens=cu[0])
    for name, x in first.items():
        x.copy_(second[name])
    if packed:
        cu[0].copy_(cu[1])
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    assert_equal(got, want)
