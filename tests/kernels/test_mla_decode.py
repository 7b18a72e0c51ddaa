"""The kernels of latent_attention for a few new tokens, against the reference in fp64.

The first step is a kernel in Gluon on Hopper, otherwise one in Triton. On a Hopper GPU both run;
other GPUs run the same tests twice without it, and the interpreter has none.
"""

import pytest
import torch

from kimi_kernels import backend, latent_attention, mla_decode_gluon
from kimi_kernels import mla_decode_triton as decode
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as, rel_err

SMALL = {"D_n": 8, "P": 8, "D_v": 5, "R": 24}
RELEASED = {"H": 32, "D_n": 128, "P": 64, "D_v": 128, "R": 512}


def make(T, S, *, B=2, H=3, dtype=torch.float32, **widths):
    """q, latent and w_kv on the device, of the scales of a model."""
    D_n, P, D_v, R = (SMALL | widths).values()
    q, latent = torch.randn(B, T, H, D_n + P), torch.randn(B, S, R + P)
    w_kv = torch.randn(H * (D_n + D_v), R) / R**0.5
    return [x.to(DEVICE, dtype) for x in (q, latent, w_kv)]


def run(name, args, scale=0.4, positions=None):
    with backend(name):
        return latent_attention(*args, scale=scale, positions=positions)


def at(*rows):
    """Positions [B, T] of each row's queries, or the last of its one query."""
    return torch.tensor([row if isinstance(row, list) else [row] for row in rows], device=DEVICE)


def check(args, positions=None, scale=0.4):
    got, ref = (run(name, args, scale, positions) for name in ("triton", "reference"))
    gold = run("reference", [x.double() for x in args], scale, positions)
    assert_as_good_as("o", got, ref, gold, args[0].dtype)
    return got


@pytest.fixture
def processors(monkeypatch):
    """Set how many multiprocessors the launcher sees, hence the number of runs."""

    def set_processors(n):
        shared = decode.device_limits(torch.empty(0, device=DEVICE).device)[1]
        monkeypatch.setattr(decode, "device_limits", lambda device: (n, shared))

    return set_processors


def use(form, monkeypatch):
    """Run this form, on widths that it takes."""
    if form == "triton":
        monkeypatch.setattr(mla_decode_gluon, "takes", lambda *args: False)
    else:
        for name, width in {"D_n": 16, "P": 16, "R": 64}.items():
            monkeypatch.setitem(SMALL, name, width)


FORMS = [(x, "triton") for x in KERNEL_DTYPES]
if DEVICE == "cuda":
    FORMS += [(x, "gluon") for x in KERNEL_DTYPES if x != torch.float32]


@pytest.fixture(params=FORMS, ids=lambda x: f"{str(x[0])[6:]}-{x[1]}")
def dtype(request, monkeypatch):
    use(request.param[1], monkeypatch)
    return request.param[0]


@pytest.fixture(params=["gluon", "triton"])
def form(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 2, 31, 63, 64, 65, 130, 300])
def test_lengths(S, dtype):
    check(make(1, S, dtype=dtype), at(S - 1, S // 2))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_new_tokens(T, dtype):
    """The last T of 70, by default; each sees one more."""
    args = make(T, 70, dtype=dtype)
    o = check(args)
    assert torch.equal(
        o, run("triton", args, positions=torch.arange(70 - T, 70).to(DEVICE).expand(2, T))
    )


@pytest.mark.parametrize("H, T", [(1, 1), (16, 1), (17, 1), (33, 1), (2, 3), (11, 3), (65, 1)])
def test_heads(H, T, dtype):
    """Blocks of queries that are full, that are not, and that part a token's heads."""
    check(make(T, 70, B=1, H=H, dtype=dtype))


@pytest.mark.parametrize(
    "change",
    [{"P": 0}, {"P": 1}, {"P": 17}, {"R": 1}, {"R": 16}, {"R": 33}, {"R": 130}, {"D_v": 1},
     {"D_v": 40}, {"D_n": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_shapes(change, dtype):
    """Widths that need not be powers of two, which Gluon leaves to Triton."""
    check(make(2, 70, **change, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_runs(n, dtype, processors):
    """One run, runs that part sequences, runs of several sequences; and a run per tile."""
    processors(n)
    lengths = (400, 1, 0, 64, 129, 400, 65, 0)
    args = make(1, 400, B=8, H=2, dtype=dtype)
    o = check(args, at(*(x - 1 for x in lengths)))
    assert (o[[2, 7]] == 0).all()


@pytest.mark.parametrize("B, n", [(1, 300), (4, 128), (4, 30)])
def test_more_runs_than_are_merged_together(B, n, dtype, processors):
    """128 of few sequences, 32, or 8 of many; the maximum moves."""
    processors(n)
    q, latent, w_kv = make(1, 4200, B=B, H=1, dtype=dtype)
    q[..., :-1], q[..., -1] = 0, 1
    latent[..., -1] = torch.linspace(0, 8, 4200)
    check((q, latent, w_kv), at(*[4199, -1, 4, 70][:B]), scale=1.0)


@pytest.mark.parametrize("n", [5, 40])
def test_blocks_that_see_different_lengths(n, dtype, processors):
    """Of one token or two; each block has runs of its own."""
    processors(n)
    where = at([3, 130, 199], [-1, -1, -1], [150, 5, -1])
    o = check(make(3, 200, B=3, H=30, dtype=dtype), where)
    assert torch.equal((o == 0).all(-1).all(-1), where < 0)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 0, 5], [5, 0, 0], [0]], ids=str)
def test_empty_sequences(lengths, n, dtype, processors):
    processors(n)
    o = check(make(1, 70, B=len(lengths), dtype=dtype), at(*(x - 1 for x in lengths)))
    for b, length in enumerate(lengths):
        assert (o[b] == 0).all() == (length == 0)


def test_positions(dtype):
    """Not sorted, repeated, negative, past the end: of queries in one block, and in several."""
    where = torch.randint(-3, 80, (3, 7), device=DEVICE)
    where[0, 0], where[1, 0] = -(2**40), 2**40
    for H in (1, 9):
        o = check(make(7, 70, B=3, H=H, dtype=dtype), where)
        assert torch.equal((o == 0).all(-1).all(-1), where < 0)


def test_many_sequences(dtype, processors, monkeypatch):
    """More of them than a program looks at together."""
    monkeypatch.setattr(decode, "SEQUENCES", 8)
    for n in (1, 5, 40):
        processors(n)
        lengths = torch.randint(0, 3, (30, 1), device=DEVICE)
        lengths[15], lengths[29] = 100, 70
        check(make(1, 100, B=30, H=1, dtype=dtype), lengths - 1)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_scores(scale, dtype, processors):
    """Nearly equal weights, and one latent that takes all, in any of the runs."""
    processors(4)
    check(make(2, 300, dtype=dtype), scale=scale)


def test_scores_that_grow_and_fall(dtype, processors):
    """The maximum moves in every tile, or is in the first; and all scores are far below 0."""
    processors(2)
    q, latent, w_kv = make(1, 300, B=3, H=1, dtype=dtype)
    q[..., :-1], q[..., -1] = 0, 1
    ramp = torch.arange(300.0, device=DEVICE)
    latent[..., -1] = torch.stack((ramp, -ramp, ramp - 1e3))
    check((q, latent, w_kv))


def test_many_weights_far_below_the_largest(dtype, processors):
    """2^26 below, less than fp16 has below 1, of latents that are all there is to sum."""
    processors(2)
    q, latent, w_kv = make(1, 300, B=1, H=2, dtype=dtype)
    q[..., :-1], q[..., -1] = 0, 1
    latent[..., :-1] = latent[..., :-1].abs() * 100
    latent[..., -1] = -torch.rand(300, device=DEVICE)
    latent[:, 0], latent[:, 0, -1] = 0, 18
    args = q, latent, w_kv
    gold = run("reference", [x.double() for x in args], 1.0)
    assert rel_err(run("triton", args, 1.0), gold) < 1e-2


def test_equal_latents(dtype):
    """The mean of one value, whatever the number of them."""
    q, latent, w_kv = make(1, 200, dtype=dtype)
    latent[:] = latent[:, :1]
    check((q, latent, w_kv))


# ---- what must not matter ----------------------------------------------------------------------


def test_two_runs_are_bit_equal_and_modify_nothing(dtype, processors):
    processors(6)
    args, where = make(2, 400, dtype=dtype), at([300, 301], [5, 399])
    before = [x.clone() for x in args]
    o = run("triton", args, positions=where)
    assert torch.equal(o, run("triton", args, positions=where))
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_later_latents_change_no_bit(dtype, processors):
    """Not past the last query, and not between the first and the last."""
    processors(3)
    q, latent, w_kv = make(3, 200, dtype=dtype)
    where = at([20, 70, 130], [0, 64, 128])
    other = latent.clone()
    other[:, 131:] = 1e3
    other[:, 71:131] = latent[:, 71:131].flip(1)
    a, b = (run("triton", (q, x, w_kv), positions=where) for x in (latent, other))
    assert torch.equal(a[:, :2], b[:, :2]) and not torch.equal(a, b)


def test_a_sequence_does_not_see_its_neighbours(processors, dtype):
    """Nor does it matter how long they are, but for the order of sums."""
    processors(3)
    args, where = make(1, 200, B=3, dtype=dtype), at(80, 130, 199)
    want = run("triton", args, positions=where)
    for b in range(3):
        alone = [x[b : b + 1] for x in args[:2]] + [args[2]]
        got = run("triton", alone, positions=where[b : b + 1])
        assert_as_good_as("o", got, want[b : b + 1], want[b : b + 1])


def test_what_no_sequence_owns_may_be_nan(processors, dtype):
    """Latents of a neighbour, and those behind a slice of the cache, lie in the same tiles."""
    processors(3)
    q, buffer, w_kv = make(1, 100, B=3, dtype=dtype)
    buffer[1, ::2], buffer[:, 70:] = torch.nan, torch.nan
    got = run("triton", (q, buffer[:, :70], w_kv))
    assert torch.isfinite(got[[0, 2]]).all() and not torch.isfinite(got[1]).any()
    check([x[[0, 2]] for x in (q, buffer[:, :70])] + [w_kv])


def test_a_longer_buffer_is_the_same():
    """A static cache: the default positions of what is filled, as explicit ones."""
    q, latent, w_kv = make(2, 90)
    buffer = torch.cat((latent, torch.full_like(latent, 1e4).repeat(1, 3, 1)), 1)
    got = run("triton", (q, buffer, w_kv), positions=at([88, 89], [88, 89]))
    want = run("reference", (q, latent, w_kv))
    assert_as_good_as("o", got, want, want)


def test_a_slice_of_the_cache_is_not_copied(dtype):
    q, buffer, w_kv = make(1, 90, dtype=dtype)
    latent = buffer[:, :77]
    x, s_t, rows = decode.cache_rows(latent)
    assert x is latent and (s_t, rows) == (latent.shape[2], 90)
    got, want = (run("triton", (q, x, w_kv)) for x in (latent, latent.contiguous()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("S", [1, 70])
@pytest.mark.parametrize("B", [1, 2])
def test_non_contiguous(B, S, dtype):
    args = make(1, S, B=B, dtype=dtype)
    where = at(*[S - 1] * B)
    want = run("triton", args, positions=where)
    q, latent, w_kv = (x.mT.contiguous().mT for x in args)
    got = run("triton", (q, latent, args[2]), positions=where.mT.contiguous().mT)
    assert torch.equal(got, want)
    check((q, latent, w_kv), where)  # cuBLAS takes another kernel for such a weight
    L = latent.shape[2]
    wide = torch.randn(B, 3 * S, L + 16, device=DEVICE).to(dtype)
    wide[:, ::3, 8 : L + 8] = args[1]
    latent = wide[:, ::3, 8 : L + 8]
    assert torch.equal(run("triton", (args[0], latent, args[2]), positions=where), want)


@pytest.mark.parametrize("offset, more", [(9, 16), (8, 17)])
def test_rows_that_are_not_aligned(offset, more, dtype):
    """The copy engine does not read them."""
    q, latent, w_kv = make(1, 70, dtype=dtype)
    L = latent.shape[2]
    wide = torch.randn(2, 70, L + more, device=DEVICE).to(dtype)
    wide[..., offset : L + offset] = latent
    check((q, wide[..., offset : L + offset], w_kv))


def test_one_row_for_the_whole_batch(dtype):
    """A latent expanded over the batch, and positions too."""
    q, latent, w_kv = make(2, 70, dtype=dtype)
    args = (q, latent[:1].expand(2, -1, -1), w_kv)
    check(args, at([40, 60]).expand(2, 2))


@pytest.mark.parametrize("T, S", [(0, 5), (0, 0)])
def test_without_queries(T, S):
    where = torch.zeros(2, T, dtype=torch.int64, device=DEVICE)
    assert run("triton", make(T, S), positions=where).shape == (2, T, 3, 5)


def test_without_latents():
    o = run("triton", make(1, 0), positions=at(-1, -1))
    assert o.shape == (2, 1, 3, 5) and (o == 0).all()


# ---- which implementation runs -----------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    calls = []
    forward = decode.latent_decode_triton
    monkeypatch.setattr(
        decode, "latent_decode_triton", lambda *args: calls.append(1) or forward(*args)
    )
    return calls


def test_gradients_take_the_reference(ran):
    args = [x.requires_grad_() for x in make(1, 9)]
    with backend("auto"):
        o = latent_attention(*args, scale=0.4)
        assert o.requires_grad and not ran
        with torch.no_grad():
            latent_attention(*args, scale=0.4)
    assert bool(ran) == (DEVICE == "cuda")
    with backend("triton"):
        with torch.no_grad():
            latent_attention(*args, scale=0.4)
        with pytest.raises(ValueError, match="the gradient of latent_attention has no Triton"):
            latent_attention(*args, scale=0.4)


@pytest.mark.parametrize("T, S", [(9, 9), (1, 1), (1000, 1001)])
def test_the_expanded_form_has_no_kernel(T, S, ran):
    args = make(T, S)
    for name in ("auto", "reference"):
        run(name, args)
    with pytest.raises(ValueError, match="the expanded form of latent_attention has no Triton"):
        run("triton", args)
    assert not ran


def test_float64_has_the_reference_only():
    args = [x.double() for x in make(1, 9)]
    run("auto", args)
    with pytest.raises(ValueError, match=r"^backend is triton, but the input is float64"):
        run("triton", args)


# ---- torch.compile -----------------------------------------------------------------------------


class TestCompile:
    @pytest.fixture
    def poison_empty(self):
        """Not here: the compiler would trace it."""

    def test_opcheck(self):
        args = make(2, 20, B=1)
        torch.library.opcheck(decode.latent_decode_op, (*args, 0.4, at([3, 4])))
        torch.library.opcheck(decode.latent_decode_op, (*args, 0.4, None))

    @pytest.mark.parametrize(
        "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
    )
    def test_compile(self, compiler):
        args, where = make(2, 70), at([68, 69], [3, 4])
        with backend("triton"), torch.no_grad():
            f = torch.compile(latent_attention, backend=compiler, fullgraph=True)
            got = f(*args, scale=0.4, positions=where)
        assert torch.equal(got, run("triton", args, positions=where))


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20])
def test_released_sizes(T, B, dtype):
    where = torch.randint(0, 3000 - T, (B, 1), device=DEVICE) + torch.arange(T, device=DEVICE)
    check(make(T, 3000, B=B, **RELEASED, dtype=dtype), where, scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 8, 16])
def test_heads_of_a_part(heads, dtype):
    """Released widths, with the heads spread over several GPUs."""
    check(make(1, 3000, **(RELEASED | {"H": heads}), dtype=dtype), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [128, 256, 1024])
def test_other_ranks(R, dtype):
    check(make(2, 1000, **(RELEASED | {"R": R}), dtype=dtype), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 32, 64])
@pytest.mark.parametrize(
    "R, P", [(64, 16), (64, 128), (128, 32), (256, 16), (256, 128), (512, 32), (512, 128)]
)
def test_widths_that_gluon_takes(R, P, H):
    args = make(1, 1000, **(RELEASED | {"R": R, "P": P, "H": H}), dtype=torch.bfloat16)
    check(args, at(999, 500), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shared", [99, 163, 227])
def test_less_shared_memory(shared, dtype, monkeypatch):
    """Every tile size of Triton's kernel, at released widths and others, as on other GPUs."""
    use("triton", monkeypatch)
    processors, found = decode.device_limits(torch.empty(0, device=DEVICE).device)
    limits = processors, min(found, shared * 1024)
    monkeypatch.setattr(decode, "device_limits", lambda device: limits)
    for change in ({"H": 8}, {"H": 32}, {"P": 0}, {"R": 256}, {"P": 128}, {"R": 1024}):
        if shared > 99 or dtype != torch.float32 or change != {"R": 1024}:
            args = make(2, 1000, **(RELEASED | change), dtype=dtype)
            check(args, at([998, 999], [3, 499]), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_a_million_tokens(form):
    """2^31 elements are passed within the fourth sequence."""
    S = 2**20
    q, latent, w_kv = make(1, 8, B=4, **RELEASED, dtype=torch.bfloat16)
    latent = torch.randn(4, S, 576, dtype=torch.bfloat16, device=DEVICE)
    where = at(S - 1, 5, S // 2, S - 1)
    got = run("triton", (q, latent, w_kv), 192**-0.5, where)
    for b in range(4):
        args = (q[b : b + 1], latent[b : b + 1], w_kv)
        ref = run("reference", args, 192**-0.5, where[b : b + 1])
        gold = run("reference", [x.double() for x in args], 192**-0.5, where[b : b + 1])
        assert_as_good_as(f"o {b}", got[b : b + 1], ref, gold)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_sequences_than_fit_32_bits(form):
    """(P + B) H R elements of partial sums."""
    B = 2**17 + 3
    args = make(1, 2, B=B, **RELEASED, dtype=torch.bfloat16)
    where = torch.randint(-1, 2, (B, 1), device=DEVICE)
    got = run("triton", args, 192**-0.5, where)[-100:]
    tail = [x[-100:] for x in args[:2]] + [args[2]]
    want = run("reference", tail, 192**-0.5, where[-100:])
    assert_as_good_as("o", got, want, want)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_cuda_graph_without_a_host_sync(T, form):
    """One graph serves all lengths; the buffer is as long as the longest."""
    args = make(T, 4096, B=3, **RELEASED, dtype=torch.bfloat16)
    where = torch.zeros(3, T, dtype=torch.int64, device=DEVICE)
    new = torch.arange(T, device=DEVICE)
    run("triton", args, positions=where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", args, positions=where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run("triton", args, positions=where)
    for first in ([0, 1, 2], [4000, 63, 64], [-T, 2000, 4096 - T]):
        where.copy_(torch.tensor(first, device=DEVICE)[:, None] + new)
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, run("triton", args, positions=where))
        ref = run("reference", args, positions=where)
        gold = run("reference", [x.double() for x in args], positions=where)
        assert_as_good_as("o", got, ref, gold)
