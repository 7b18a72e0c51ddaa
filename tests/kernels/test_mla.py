"""latent_attention against a softmax written out per head and query."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from kimi_kernels import latent_attention, mla, quantize_latents
from kimi_kernels.checks import count_sequences
from tests.helpers import DEVICE, assert_as_good_as

NAMES = ("o", "dq", "dlatent", "dw_kv")
SIZES = {"H": 3, "D_n": 4, "P": 2, "D_v": 5, "R": 6}


def naive_attention(q, latent, w_kv, scale, positions):
    """Keys and values of every head built out, then one softmax per head and query."""
    (B, T, H, D), L, R = q.shape, latent.shape[2], w_kv.shape[1]
    D_n = D - (L - R)
    c, k_r = latent[..., :R], latent[..., R:]
    rows = []
    for b in range(B):
        for t in range(T):
            seen = int(positions[b, t]) + 1
            for w in w_kv.view(H, -1, R):
                h = len(rows) % H
                k = torch.cat((c[b, :seen] @ w[:D_n].T, k_r[b, :seen]), -1)
                p = torch.exp(scale * (k @ q[b, t, h]))
                rows.append((p / p.sum()) @ (c[b, :seen] @ w[D_n:].T))
    D_v = w_kv.shape[0] // H - D_n
    return torch.stack(rows).view(B, T, H, D_v) if rows else q.new_zeros(B, T, H, D_v)


def last(B, T, S):
    """Positions of T queries that are the last of S tokens."""
    return torch.arange(S - T, S).expand(B, T)


def make(T, S, *, B=2, H=3, D_n=4, P=2, D_v=5, R=6, dtype=torch.float64):
    q = torch.randn(B, T, H, D_n + P).to(dtype)
    latent, w_kv = torch.randn(B, S, R + P), torch.randn(H * (D_n + D_v), R) / R**0.5
    return q, latent.to(dtype), w_kv.to(dtype)


def run(args, do, op=latent_attention, **options):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    o = op(*leaves, scale=0.4, **options)
    return o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))


def check(args, positions=None, **options):
    """Value and gradients against the naive loop in fp64, and both forms are equal."""
    (B, T, H, D), S, (rows, R) = args[0].shape, args[1].shape[1], args[2].shape
    D_n = D - (args[1].shape[2] - R)
    do = torch.randn(B, T, H, rows // H - D_n).double()
    where = last(B, T, S) if positions is None else positions
    gold = run(args, do, naive_attention, positions=where)
    got = run(args, do, positions=positions, **options)
    results = [got, run(args, do, form(mla._absorbed), positions=where)]
    results += [run(args, do, form(mla._expanded), positions=where)]
    for result in results:
        for name, a, b in zip(NAMES, result, gold, strict=True):
            assert_as_good_as(name, a, b, b)


def form(inner):
    """One of the two forms, behind the arguments of the public function."""

    def op(q, latent, w_kv, *, scale, positions):
        w = w_kv.view(q.shape[2], -1, w_kv.shape[1])
        return inner(q, latent, w, w_kv.shape[1], scale, positions)

    return op


# ---- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(7, 7), (1, 9), (4, 9), (8, 9), (2, 40)])
def test_against_naive(T, S):
    check(make(T, S))


def test_one_token_gets_its_own_value():
    q, latent, w_kv = make(1, 1)
    o = latent_attention(q, latent, w_kv, scale=0.4)
    v = (latent[..., :6] @ w_kv.view(3, 9, 6)[:, 4:].mT[:, None]).view(3, 2, 1, 5)
    assert_as_good_as("o", o, v.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))


@pytest.mark.parametrize(
    "change",
    [{"P": 0}, {"D_v": 1}, {"D_v": 9}, {"D_v": 4}, {"H": 1}, {"R": 1}, {"D_n": 1}, {"R": 30}],
    ids=str,
)
@pytest.mark.parametrize("T, S", [(6, 6), (2, 6)])
def test_shapes(change, T, S):
    check(make(T, S, **(SIZES | change)))


@pytest.mark.parametrize("most", [1, 60, 200, 10**4])
@pytest.mark.parametrize("T, S", [(20, 20), (20, 33)])
def test_expanded_in_parts(T, S, most, monkeypatch):
    """A few heads, and with positions a few queries at a time."""
    monkeypatch.setattr(mla, "AT_ONCE", most)
    args = make(T, S)
    check(args)
    check(args, positions=torch.randint(0, S, (2, T)))


@pytest.mark.parametrize("T", [1, 3, 20])
def test_positions(T):
    """Any positions: not sorted, repeated, different in every row; later latents do not count."""
    check(make(T, 9), positions=torch.randint(0, 9, (2, T)))


@pytest.mark.parametrize("T", [2, 20])
def test_a_query_that_sees_nothing(T):
    """In both forms; it gives no gradient, and the others are as without it."""
    args, where = make(T, 9), torch.randint(0, 9, (2, T))
    where[0, 0] = -1
    do = torch.randn(2, T, 3, 5).double()
    do[0, 0] = 0
    got, want = (run(args, do, positions=x) for x in (where, where.clamp(min=0)))
    assert (got[0][0, 0] == 0).all() and (got[1][0, 0] == 0).all()
    got[0][0, 0] = want[0][0, 0]
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_as_good_as(name, a, b, b)


def test_positions_of_the_last_tokens_are_the_default():
    args = make(4, 9)
    want = latent_attention(*args, scale=0.4)
    got = latent_attention(*args, scale=0.4, positions=last(2, 4, 9))
    assert_as_good_as("o", got, want, want)


def test_unseen_latents_may_hold_anything():
    """A cache is longer than what is filled: the rest changes no bit."""
    q, latent, w_kv = make(2, 9, dtype=torch.float32)
    positions = torch.tensor([[3, 5], [0, 5]])
    other = latent.clone()
    other[:, 6:] = 1e4 * torch.randn_like(other[:, 6:])
    a, b = (latent_attention(q, x, w_kv, scale=0.4, positions=positions) for x in (latent, other))
    assert torch.equal(a, b)


def test_large_scores_do_not_overflow():
    q, latent, w_kv = make(5, 9, dtype=torch.float32)
    for T in (5, 1):
        o = latent_attention(1e3 * q[:, :T], 1e3 * latent, w_kv, scale=1.0)
        assert torch.isfinite(o).all()


@pytest.mark.parametrize("T, S", [(0, 0), (0, 5)])
def test_without_queries(T, S):
    assert latent_attention(*make(T, S), scale=0.4).shape == (2, T, 3, 5)


@pytest.mark.parametrize("T, S", [(70, 70), (3, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, T, S):
    sizes = {"H": 2, "D_n": 16, "P": 8, "D_v": 12, "R": 32}
    args, do = make(T, S, dtype=dtype, **sizes), torch.randn(2, T, 2, 12).to(dtype).double()
    where = last(2, T, S)

    def plain(q, latent, w_kv, *, scale, positions):  # the naive order, in this dtype
        c, k_r = latent[..., :32], latent[..., 32:]
        kv = (c @ w_kv.T).unflatten(-1, (2, 28)).transpose(1, 2)
        k = torch.cat((kv[..., :16], k_r[:, None].expand(-1, 2, -1, -1)), -1)
        s = (q.transpose(1, 2) @ k.mT).float() * scale
        later = torch.arange(S) > positions[:, None, :, None]
        p = s.masked_fill(later, -torch.inf).softmax(-1).to(dtype)
        return (p @ kv[..., 16:]).transpose(1, 2)

    got, ref = run(args, do), run(args, do, plain, positions=where)
    gold = run([x.double() for x in args], do, naive_attention, positions=where)
    for name, a, b, c in zip(NAMES, got, ref, gold, strict=True):
        assert a.dtype == dtype
        assert_as_good_as(name, a, b, c)


@pytest.mark.parametrize("T, S", [(3, 3), (1, 3)])
def test_gradcheck(T, S):
    args = make(T, S, B=1, H=2, D_n=2, P=1, D_v=3, R=2)
    leaves = [x.requires_grad_() for x in args]
    assert gradcheck(lambda *x: latent_attention(*x, scale=0.4), leaves)


@pytest.mark.parametrize("T, R, absorbed", [(1, 512, True), (64, 512, True), (10**5, 512, False)])
def test_few_queries_take_the_absorbed_form(T, R, absorbed):
    assert mla.absorbed_is_cheaper(T, R, P=64, D_n=128, D_v=128) is absorbed


# ---- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5], [2, 6]])
def test_in_pieces_is_at_once(cuts):
    q, latent, w_kv = make(8, 8)
    want = latent_attention(q, latent, w_kv, scale=0.4)
    pieces = [
        latent_attention(q[:, a:b], latent[:, :b], w_kv, scale=0.4)
        for a, b in itertools.pairwise([0, *cuts, 8])
    ]
    assert_as_good_as("o", torch.cat(pieces, 1), want, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [12, 20])
def test_later_tokens_change_no_bit(S, dtype):
    q, latent, w_kv = make(12, S, dtype=dtype)
    q2, latent2 = q.clone(), latent.clone()
    q2[:, 5:], latent2[:, S - 7 :] = q[:, 5:].flip(0), latent[:, S - 7 :].flip(0)
    a, b = (latent_attention(*x, w_kv, scale=0.4) for x in ((q, latent), (q2, latent2)))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a, b)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("most", [1, 2**30])  # one head at a time, all
@pytest.mark.parametrize("lengths", [[3, 4], [0, 2, 0, 5, 1, 0], [7], [0, 0]], ids=str)
def test_packed_is_separate(lengths, most, cu_dtype, monkeypatch):
    monkeypatch.setattr(mla, "AT_ONCE", most)
    T = sum(lengths)
    args = make(T, T, B=1)
    ends = torch.tensor([0, *lengths]).cumsum(0)

    def one_by_one(q, latent, w_kv, *, scale):
        outs = [
            latent_attention(q[:, a:b], latent[:, a:b], w_kv, scale=scale)
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(outs, 1)

    do = torch.randn(1, T, 3, 5).double()
    got, want = run(args, do, cu_seqlens=ends.to(cu_dtype)), run(args, do, one_by_one)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_as_good_as(name, a, b, b)


@pytest.mark.gpu
def test_ends_on_the_host():
    """Nothing waits for the GPU then, and other ops still want theirs on it."""
    q, latent, w_kv = (x.cuda().requires_grad_() for x in make(9, 9, B=1, dtype=torch.bfloat16))
    ends = torch.tensor([0, 2, 2, 9])
    want = latent_attention(q, latent, w_kv, scale=0.4, cu_seqlens=ends.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = latent_attention(q, latent, w_kv, scale=0.4, cu_seqlens=ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="cu_seqlens is on cpu, want cuda"):
        count_sequences(ends, q)


def test_a_packed_document_does_not_see_its_neighbours():
    q, latent, w_kv = make(9, 9, B=1)
    do, cu = torch.randn(1, 9, 3, 5).double(), torch.tensor([0, 2, 6, 9])
    q2, latent2, do2 = (x.flip(1) for x in (q, latent, do))
    for old, new in ((q, q2), (latent, latent2), (do, do2)):
        new[:, 2:6] = old[:, 2:6]
    a = run((q, latent, w_kv), do, cu_seqlens=cu)
    b = run((q2, latent2, w_kv), do2, cu_seqlens=cu)
    for name, x, y in zip(NAMES[:3], a, b, strict=False):
        assert torch.equal(x[:, 2:6], y[:, 2:6]) and not torch.equal(x, y), name


@pytest.mark.parametrize("T", [9, 1])
def test_two_runs_are_bit_equal_and_modify_nothing(T):
    args, do = make(T, 9, dtype=torch.float32), torch.randn(2, T, 3, 5)
    before = [x.clone() for x in args]
    for a, b in zip(run(args, do), run(args, do), strict=True):
        assert torch.equal(a, b)
    latent_attention(*args, scale=0.4)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [9, 1])
def test_non_contiguous(T):
    args = make(T, 9)
    want = latent_attention(*args, scale=0.4)
    got = latent_attention(*(x.mT.contiguous().mT for x in args), scale=0.4)
    assert_as_good_as("o", got, want, want)


# ---- tiles -------------------------------------------------------------------------------------

RELEASED = {"H": 32, "D_n": 128, "P": 64, "D_v": 128, "R": 512}
PER_TOKEN = 2 * 3 * (4 + 2 + 5)  # numbers of keys and values, in the shapes of `make`


@pytest.fixture
def calls(monkeypatch):
    """Keys and causality of every attention to a tile."""
    found, attend = [], mla.attend

    def spy(q, k, v, causal, scale, planned):
        found.append((k.shape[2], causal))
        return attend(q, k, v, causal, scale, planned)

    monkeypatch.setattr(mla, "attend", spy)
    return found


def form_of(inner, args, *rest):
    """One of the forms, whichever is cheaper."""
    q, latent, w_kv = args
    R = w_kv.shape[1]
    return inner(q, latent, w_kv.view(q.shape[2], -1, R), R, 0.4, *rest)


def check_tiles(args, got):
    """Against one attention with a mask."""
    (B, T), S = args[0].shape[:2], args[1].shape[1]
    where = last(B, T, S).to(args[0].device)
    ref, gold = (form_of(mla._expanded, x, where) for x in (args, [x.double() for x in args]))
    assert_as_good_as("o", got, ref, gold)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "most, T, S, tiles",
    [
        (PER_TOKEN * 32, 20, 100, [20, 32, 32, 16]),
        (PER_TOKEN * 31, 20, 33, [16, 13, 4, 16, 13]),
        (PER_TOKEN * 8, 20, 21, [8, 1, 8, 8, 1, 4, 8, 8, 1]),
        (1, 20, 21, [1] * 230),
    ],
)
def test_tiles(most, T, S, tiles, dtype, calls, monkeypatch):
    """Tiles of the past, whole and not, and of the queries; the first of a block is causal."""
    monkeypatch.setattr(mla, "AT_ONCE", most)
    args = make(T, S, dtype=dtype)
    check_tiles(args, latent_attention(*args, scale=0.4))
    assert [n for n, _ in calls] == tiles
    assert sum(causal for _, causal in calls) == -(-T // max(tiles))


@pytest.mark.parametrize(
    "change", [{"P": 0}, {"D_v": 1}, {"H": 1, "B": 1}, {"B": 3}, {"B": 0}], ids=str
)
def test_shapes_in_tiles(change, calls, monkeypatch):
    monkeypatch.setattr(mla, "AT_ONCE", PER_TOKEN * 8)
    args = make(30, 50, **change)
    check_tiles(args, latent_attention(*args, scale=0.4))
    assert len(calls) > 1


def test_scores_far_apart_in_tiles(monkeypatch):
    """Scores of 1e4 and more in one tile: the others count for nothing, and nothing overflows."""
    monkeypatch.setattr(mla, "AT_ONCE", PER_TOKEN * 8)
    q, latent, w_kv = make(20, 50, dtype=torch.float32)
    latent[:, 8:16] *= 1e3
    args = 100 * q, latent, w_kv
    check_tiles(args, latent_attention(*args, scale=0.4))


def test_fp8_in_tiles(calls, monkeypatch):
    """A tile at a time is in the model's dtype."""
    monkeypatch.setattr(mla, "AT_ONCE", PER_TOKEN * 8)
    q, latent, w_kv = make(20, 50, dtype=torch.float32)
    latents = quantize_latents(latent, 6)
    got, want = (latent_attention(q, x, w_kv, scale=0.4) for x in (latents, latents.dequantize()))
    assert torch.equal(got, want) and len(calls) > 6


def test_later_tokens_change_no_bit_in_tiles(monkeypatch):
    monkeypatch.setattr(mla, "AT_ONCE", PER_TOKEN * 8)
    q, latent, w_kv = make(20, 30, dtype=torch.float32)
    q2, latent2 = q.clone(), latent.clone()
    q2[:, 11:], latent2[:, 21:] = q[:, 11:].flip(0), latent[:, 21:].flip(0)
    a, b, again = (
        latent_attention(*x, w_kv, scale=0.4) for x in ((q, latent), (q2, latent2), (q, latent))
    )
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a, b) and torch.equal(a, again)


def test_where_there_are_no_tiles(calls):
    """With a gradient, positions, nothing before the queries, or for a compiler."""
    args = [x.to(DEVICE) for x in make(20, 33, dtype=torch.float32)]
    latent_attention(*args, scale=0.4, positions=last(2, 20, 33).to(DEVICE))
    latent_attention(*make(20, 20), scale=0.4)
    latent_attention(args[0].clone().requires_grad_(), *args[1:], scale=0.4)
    torch.compiler.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    got = compiled(*args, scale=0.4)
    assert not calls
    check_tiles(args, got)
    latent_attention(*args, scale=0.4)
    assert calls


def make_on_gpu(T, S, dtype, **widths):
    return [x.cuda() for x in make(T, S, dtype=dtype, **(RELEASED | widths))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel",
    [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "widths",
    [{}, {"D_n": 16, "P": 8, "D_v": 16, "R": 8}, {"D_n": 12, "P": 4, "D_v": 40, "R": 16},
     {"D_n": 3, "P": 2, "D_v": 5, "R": 7}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "B, T, S", [(2, 9, 700), (2, 170, 171), (3, 1025, 3000), (1, 1024, 5000), (1, 3000, 20000)]
)
def test_tiles_on_a_gpu(B, T, S, widths, dtype, kernel, monkeypatch):
    """Tiles of 1024 tokens; each kernel by itself, or plain torch for what it does not take."""
    args = make_on_gpu(T, S, dtype, B=B, H=4, **widths)
    numbers = args[0].shape[-1] + widths.get("D_v", 128)
    monkeypatch.setattr(mla, "AT_ONCE", B * 4 * numbers * 1024)
    with sdpa_kernel(kernel):
        got, again = (form_of(mla._in_tiles, args) for _ in range(2))
    assert torch.equal(got, again)
    check_tiles(args, got)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_memory_of_a_long_past():
    """Keys and values of a tile, not of the 300,000 tokens: those would be 6 GB, without copies."""
    args = make_on_gpu(4096, 300_000, torch.bfloat16, B=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latent_attention(*args, scale=0.4)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 3 * mla.AT_ONCE


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change",
    [
        ("q, latent, w_kv", {"q": torch.zeros(2, 4, 18)}),
        ("q, latent, w_kv", {"latent": torch.zeros(2, 4, 1, 8)}),
        ("q, latent, w_kv", {"w_kv": torch.zeros(3, 9, 6)}),
        ("q", {x: torch.zeros(s).long() for x, s in zip(
            ("q", "latent", "w_kv"), ((2, 4, 3, 6), (2, 4, 8), (27, 6)), strict=True)}),
        ("q", {"q": torch.zeros(2, 4, 0, 6)}),
        ("latent", {"latent": tuple(quantize_latents(torch.zeros(2, 4, 8), 6))}),
        ("latent", {"latent": torch.zeros(1, 4, 8)}),
        ("latent", {"latent": torch.zeros(2, 4, 8).double()}),
        ("latent", {"latent": torch.zeros(2, 4, 8, device="meta")}),
        ("latent", {"latent": torch.zeros(2, 3, 8)}),
        ("w_kv", {"w_kv": torch.zeros(27, 6).bfloat16()}),
        ("w_kv", {"w_kv": torch.zeros(28, 6)}),
        ("w_kv", {"w_kv": torch.zeros(12, 6)}),
        ("w_kv", {"w_kv": torch.zeros(27, 9)}),
        ("w_kv", {"w_kv": torch.zeros(27, 2)}),
        ("positions", {"positions": torch.zeros(2, 3).long()}),
        ("positions", {"positions": torch.zeros(4).long()}),
        ("positions", {"positions": torch.zeros(2, 4)}),
        ("positions", {"positions": torch.zeros(2, 4, device="meta").long()}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4]), "positions": last(2, 4, 4)}),
        ("cu_seqlens", {"q": torch.zeros(1, 4, 3, 6), "latent": torch.zeros(1, 4, 8),
                        "cu_seqlens": torch.zeros(2, device="meta").long()}),
        ("scale", {"scale": None}),
    ],
)  # fmt: skip
def test_errors(name, change):
    good = {"q": torch.zeros(2, 4, 3, 6), "latent": torch.zeros(2, 4, 8)}
    good |= {"w_kv": torch.zeros(27, 6), "scale": 1.0}
    latent_attention(**good)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        latent_attention(**(good | change))


@pytest.mark.parametrize("cu", [[1, 4], [0, 3, 2, 4], [0, 3], [0, 5], [[0, 4]], [0], [0.0, 4.0]])
def test_bad_cu_seqlens(cu):
    with pytest.raises(ValueError, match=r"^cu_seqlens\b"):
        latent_attention(*make(4, 4, B=1), scale=1.0, cu_seqlens=torch.tensor(cu))


def test_packed_queries_need_all_their_latents():
    with pytest.raises(ValueError, match=r"^latent\b"):
        latent_attention(*make(4, 6, B=1), scale=1.0, cu_seqlens=torch.tensor([0, 4]))
