"""The kernels of latent_attention on latents in fp8, against the reference on the same in fp64.

As in test_mla_decode.py: on Hopper one in Gluon and one in Triton, elsewhere the one in Triton.
"""

import pytest
import torch

from kimi_kernels import backend, latent_attention, mla_fp8_gluon, quantize_latents
from kimi_kernels import mla_decode_triton as decode
from kimi_kernels.latents import FP8, QuantizedLatents
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_as_good_as
from tests.kernels.test_mla_decode import FORMS, RELEASED, at, processors  # noqa: F401
from tests.kernels.test_mla_decode import make as make_plain

WIDE = {"D_n": 16, "P": 16, "D_v": 5, "R": 256}  # the narrowest that Gluon takes


def make(T, S, **sizes):
    """Latents of which each has another scale, by up to 2^4."""
    q, latent, w_kv = make_plain(T, S, **(WIDE | sizes))
    R = w_kv.shape[1]
    latent[..., :R] *= torch.randint(-2, 3, (*latent.shape[:2], 1), device=DEVICE).exp2()
    return [q, quantize_latents(latent, R), w_kv]


def run(name, args, scale=0.4, positions=None):
    with backend(name):
        return latent_attention(*args, scale=scale, positions=positions)


def wide(q, latent, w_kv):
    """In fp64, of the same 8 bits."""
    return q.double(), latent._replace(k_r=latent.k_r.double()), w_kv.double()


def part(latent, *index):
    return QuantizedLatents(*(x[index] for x in latent))


def compare(got, args, positions=None, scale=0.4):
    """Hopper's kernel has eight bits of a query and e4m3 products in 14 bits: as bf16 at best."""
    q, latent, w_kv = args
    ref = run("reference", args, scale, positions)
    gold = run("reference", wide(*args), scale, positions)
    gluon = mla_fp8_gluon.takes(*decode.latent_rows(latent, w_kv.shape[1])[:2])
    assert_as_good_as("o", got, ref, gold, torch.bfloat16 if gluon else q.dtype)


def check(args, positions=None, scale=0.4):
    got = run("triton", args, scale, positions)
    compare(got, args, positions, scale)
    return got


@pytest.fixture(params=FORMS, ids=lambda x: f"{str(x[0])[6:]}-{x[1]}")
def dtype(request, monkeypatch):
    if request.param[1] == "triton":
        monkeypatch.setattr(mla_fp8_gluon, "takes", lambda *args: False)
    return request.param[0]


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(2, 9), (1, 9), (8, 70), (30, 30), (300, 310)])
def test_the_reference_is_that_of_what_they_mean(T, S):
    """Both forms; gradients reach q and w_kv."""
    q, latent, w_kv = make_plain(T, S, dtype=torch.float64)
    latent = quantize_latents(latent, w_kv.shape[1])
    args = q.requires_grad_(), w_kv.requires_grad_()
    found = []
    for x in (latent, latent.dequantize()):
        o = latent_attention(q, x, w_kv, scale=0.4)
        found.append((o.detach(), *torch.autograd.grad(o.sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("S", [1, 31, 64, 65, 130, 300])
def test_lengths(S, dtype):
    check(make(1, S, dtype=dtype), at(S - 1, S // 2))


@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_new_tokens(T, dtype):
    args = make(T, 70, dtype=dtype)
    o = check(args)
    where = torch.arange(70 - T, 70).to(DEVICE).expand(2, T)
    assert torch.equal(o, run("triton", args, positions=where))


@pytest.mark.parametrize("H, T", [(1, 1), (17, 1), (11, 3), (65, 1)])
def test_heads(H, T, dtype):
    check(make(T, 70, B=1, H=H, dtype=dtype))


@pytest.mark.parametrize("change", [{"P": 0}, {"P": 17}, {"R": 1}, {"R": 33}, {"R": 130}], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_shapes(change, dtype):
    """Widths that Gluon leaves to Triton."""
    check(make(2, 70, **change, dtype=dtype))


@pytest.mark.parametrize("n", [1, 3, 100])
def test_runs(n, dtype, processors):  # noqa: F811
    """One run, runs that part sequences, runs of several sequences; and a run per tile."""
    processors(n)
    lengths = (400, 1, 0, 129, 400, 65, 0)
    o = check(make(1, 400, B=7, H=2, dtype=dtype), at(*(x - 1 for x in lengths)))
    assert (o[[2, 6]] == 0).all()


def test_positions(dtype):
    """Not sorted, repeated, negative, past the end."""
    where = torch.randint(-3, 80, (3, 7), device=DEVICE)
    where[0, 0], where[1, 0] = -(2**40), 2**40
    for H in (1, 9):
        o = check(make(7, 70, B=3, H=H, dtype=dtype), where)
        assert torch.equal((o == 0).all(-1).all(-1), where < 0)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_extreme_scores(scale, dtype, processors):  # noqa: F811
    processors(4)
    check(make(2, 300, dtype=dtype), scale=scale)


@pytest.mark.parametrize("most", [2.0**-36, 2.0**4])
def test_extreme_latents(most, dtype, processors):  # noqa: F811
    """Nothing is as large as the others, and some tokens are nothing at all."""
    processors(2)
    q, latent, w_kv = make_plain(1, 200, **WIDE, dtype=dtype)
    latent = quantize_latents(latent, WIDE["R"])
    small = torch.rand(2, 200, device=DEVICE) < 0.3
    latent = latent._replace(scale=latent.scale.where(small, most))
    latent.c[:, ::7] = torch.zeros((), dtype=FP8)
    latent.scale[:, ::5] = 0
    check((q, latent, w_kv))


@pytest.mark.parametrize("size", [1e-4, 100])
def test_extreme_queries(size, dtype):
    """Whose products with W_k are far from 1."""
    q, latent, w_kv = make_plain(2, 130, **WIDE, dtype=dtype)
    latent = quantize_latents(latent, WIDE["R"])
    check((q * size, latent, w_kv), scale=0.4 / size)
    q[:, 0] *= size
    check((q, latent, w_kv))


@pytest.mark.parametrize("size", [2.0**-10, 2.0**10])
def test_queries_whose_parts_differ(size, dtype):
    """By so much that one power of two fits neither."""
    q, latent, w_kv = make_plain(2, 130, **WIDE, dtype=dtype)
    q[..., -WIDE["P"] :] *= size
    check((q, quantize_latents(latent, WIDE["R"]), w_kv), scale=0.4 / max(1, size))


# ---- what must not matter ----------------------------------------------------------------------


def test_two_runs_are_bit_equal_and_modify_nothing(dtype, processors):  # noqa: F811
    processors(6)
    args, where = make(2, 400, dtype=dtype), at([300, 301], [5, 399])
    before = [x.clone() for x in args[1]]
    o = run("triton", args, positions=where)
    assert torch.equal(o, run("triton", args, positions=where))
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(args[1], before, strict=True))


def test_what_no_sequence_owns_may_be_nan(dtype, processors):  # noqa: F811
    """A neighbour's latents, and those behind a slice of the cache; a slice is not copied."""
    processors(3)
    q, buffer, w_kv = make(1, 100, B=3, dtype=dtype)
    for x in (buffer.k_r, buffer.scale):
        x[1, ::2], x[:, 70:] = torch.nan, torch.nan
    buffer.c.view(torch.uint8)[:, 70:] = 127
    latent = part(buffer, slice(None), slice(70))
    c, k_r, factors = decode.latent_rows(latent, WIDE["R"])
    assert [x.data_ptr() for x in (c.x, k_r.x, factors)] == [x.data_ptr() for x in latent]
    got = run("triton", (q, latent, w_kv))
    assert torch.isfinite(got[[0, 2]]).all() and not torch.isfinite(got[1]).any()
    check((q[[0, 2]], part(latent, [0, 2]), w_kv))
    buffer.k_r[:, 70:], buffer.scale[:, 70:] = 1, 1  # what no query sees must be finite
    buffer.c.view(torch.uint8)[:, 70:] = 56
    assert torch.equal(
        got[[0, 2]], run("triton", (q, buffer, w_kv), positions=at(69, 69, 69))[[0, 2]]
    )


def test_non_contiguous(dtype):
    args, where = make(1, 70, dtype=dtype), at(69, 40)
    want = run("triton", args, positions=where)
    apart = [torch.zeros(2, 210, *x.shape[2:], device=DEVICE).to(x.dtype) for x in args[1]]
    for x, y in zip(apart, args[1], strict=True):
        x[:, ::3] = y
    latent = part(QuantizedLatents(*apart), slice(None), slice(None, None, 3))
    assert torch.equal(run("triton", (args[0], latent, args[2]), positions=where), want)
    turned = QuantizedLatents(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in args[1]))
    assert torch.equal(run("triton", (args[0], turned, args[2]), positions=where), want)


@pytest.mark.parametrize("name", ["c", "k_r"])
def test_rows_that_are_not_aligned(name, dtype):
    q, latent, w_kv = make(1, 70, dtype=dtype)
    x = getattr(latent, name)
    room = torch.zeros(2, 70, x.shape[2] + 24, device=DEVICE).to(x.dtype)
    room[..., 9 : x.shape[2] + 9] = x
    check((q, latent._replace(**{name: room[..., 9 : x.shape[2] + 9]}), w_kv))


# ---- errors, which implementation --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change",
    [
        ("c", {"c": torch.zeros(2, 9, 24).half()}),
        ("c", {"c": torch.zeros(2, 9, 23).to(FP8)}),
        ("k_r", {"k_r": torch.zeros(2, 9, 8).half()}),
        ("k_r", {"k_r": torch.zeros(2, 8, 8)}),
        ("scale", {"scale": torch.zeros(2, 9).half()}),
        ("scale", {"scale": torch.zeros(2, 9, 1)}),
        ("scale", {"scale": torch.zeros(2, 9, device="meta")}),
    ],
)
def test_errors(name, change):
    q, latent, w_kv = (x.cpu() if isinstance(x, torch.Tensor) else x for x in make_plain(1, 9))
    latent = quantize_latents(latent, 24)
    latent_attention(q, latent, w_kv, scale=0.4)
    with pytest.raises(ValueError, match=rf"^latent\.{name} (is|has)"):
        latent_attention(q, latent._replace(**change), w_kv, scale=0.4)


def test_gluon_tiles_fit():
    for queries in (1, 16, 17, 32, 33, 256):
        for R, P in [(256, 16), (256, 128), (512, 16), (512, 64), (512, 128)]:
            tiles, resident = mla_fp8_gluon.pick_tiles(queries, R, P)
            BM, BN, _ = tiles.values()
            stored = 2 * (BN * (R + P) + BM * (R + P + BN))
            assert stored + 1024 <= 227 * 1024 and resident * (stored + 2048) <= 228 * 1024


def test_what_gluon_takes(monkeypatch):
    def takes(change, found=(9, 0)):
        monkeypatch.setattr(mla_fp8_gluon, "capability", lambda device: found)
        latent = quantize_latents(torch.zeros(2, 70, 576, dtype=torch.float16), 512)
        latent = latent._replace(**{"k_r": latent.k_r.clone()} | change)
        return mla_fp8_gluon.takes(*decode.latent_rows(latent, 512)[:2])

    c, k_r = torch.zeros(2, 70, 600).to(FP8), torch.zeros(2, 70, 64)
    for change in ({}, {"k_r": k_r.bfloat16()}, {"c": c[..., :256].clone()}):
        assert takes(change)
    unaligned = {"c": c[..., :512]}, {"k_r": k_r.half()[..., 1:33]}
    for change in (*unaligned, {"k_r": k_r}, {"c": c[..., :128].clone()}, {"k_r": k_r[..., :8]}):
        assert not takes(change)
    assert not any(takes({}, found) for found in [(8, 0), (8, 9), (10, 0), (12, 0), (0, 0)])


class TestCompile:
    @pytest.fixture
    def poison_empty(self):
        """Not here: the compiler would trace it."""

    def test_compile(self):
        args, where = make(2, 70), at([68, 69], [3, 4])
        parts = args[0], args[1].c, args[2], 0.4, where, *args[1][1:]
        torch.library.opcheck(decode.latent_decode_op, parts, test_utils="test_faketensor")
        with backend("triton"), torch.no_grad():
            f = torch.compile(latent_attention, backend="aot_eager", fullgraph=True)
            got = f(*args, scale=0.4, positions=where)
        assert torch.equal(got, run("triton", args, positions=where))


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 5, 64])
@pytest.mark.parametrize("T", [*range(1, 9), 20])
def test_released_sizes(T, B, dtype):
    where = torch.randint(0, 3000 - T, (B, 1), device=DEVICE) + torch.arange(T, device=DEVICE)
    check(make(T, 3000, B=B, **RELEASED, dtype=dtype), where, scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 5000])
def test_ends_of_tiles(S, dtype):
    check(make(1, S, **RELEASED, dtype=dtype), at(S - 1, S // 2), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 8, 16, 64])
def test_other_heads(heads, dtype):
    check(make(1, 3000, **(RELEASED | {"H": heads}), dtype=dtype), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 32, 64])
@pytest.mark.parametrize("R, P", [(256, 16), (256, 128), (512, 32), (512, 128), (1024, 64)])
def test_other_widths(R, P, H, dtype):
    args = make(1, 1000, **(RELEASED | {"R": R, "P": P, "H": H}), dtype=dtype)
    check(args, at(999, 500), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_a_million_tokens(dtype):
    """2^31 bytes are passed within the fourth sequence, and the last one."""
    S = 2**20
    q, latent, w_kv = make(1, 8, B=5, **RELEASED, dtype=dtype)
    latent = QuantizedLatents(
        torch.randn(5, S, 512, dtype=torch.bfloat16, device=DEVICE).to(FP8),
        torch.randn(5, S, 64, device=DEVICE).to(dtype),
        torch.rand(5, S, device=DEVICE) + 0.5,
    )
    where = at(S - 1, 5, S // 2, S - 1, S - 1)
    got = run("triton", (q, latent, w_kv), 192**-0.5, where)
    for b in range(5):
        args = q[b : b + 1], part(latent, slice(b, b + 1)), w_kv
        compare(got[b : b + 1], args, where[b : b + 1], 192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [(torch.bfloat16, x) for x in ("triton", "gluon")], indirect=True)
def test_a_million_weak_tokens(dtype):
    """Each is 2^-25.4 of the strongest, all together 2 %."""
    S, R, P = 2**20, WIDE["R"], WIDE["P"]
    q, _, w_kv = make(1, 8, B=1, **WIDE, dtype=dtype)
    k_r = torch.zeros(1, S, P, dtype=dtype, device=DEVICE)
    c = torch.ones(1, S, R, device=DEVICE)
    q[...], q[..., -P] = 0, 1
    k_r[:, S // 3, 0], c[:, S // 3] = 17.625, -1
    latent = QuantizedLatents(c.to(FP8), k_r, torch.ones(1, S, device=DEVICE))
    check((q, latent, w_kv), scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_cuda_graph_without_a_host_sync(T, dtype):
    """One graph serves all lengths; the buffer is as long as the longest."""
    args = make(T, 4096, B=3, **RELEASED, dtype=dtype)
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
        assert torch.equal(got, check(args, where))
