"""Who attends within a prompt: flash-attn-4, cuDNN with few shapes, torch's packed attention."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kimi_kernels import attention, latent_attention, mla, quantize_latents
from tests.helpers import assert_as_good_as
from tests.kernels.test_mla import NAMES, last, make, run

LENGTHS = [[3, 4], [0, 2, 0, 5, 1, 0], [7], [1] * 9, [70, 1, 0, 300]]
SHAPES = [(1, 9, 9), (2, 9, 9), (2, 20, 33), (1, 300, 301)]


def ends_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def with_masks(q, latent, w_kv, *, scale, cu_seqlens=None):
    """Each document by itself, by a mask and torch's plain arithmetic."""
    S, T = latent.shape[1], q.shape[1]
    w = w_kv.view(q.shape[2], -1, w_kv.shape[1])
    outputs = []
    for a, b in itertools.pairwise([0, T] if cu_seqlens is None else cu_seqlens.tolist()):
        past = S - T if cu_seqlens is None else 0
        seen = last(q.shape[0], b - a, past + b - a).to(q.device)
        part = q[:, a:b], latent[:, a : past + b], w, w.shape[2], scale, seen
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(mla._expanded(*part))
    return torch.cat(outputs, 1)


def gradient_for(args):
    q, latent, w_kv = args
    D_v = w_kv.shape[0] // q.shape[2] - (q.shape[3] - (latent.shape[2] - w_kv.shape[1]))
    return torch.randn(*q.shape[:3], D_v, device=q.device).to(q.dtype)


def check(args, **options):
    """Value and gradients against masks, in the same dtype and in fp64."""
    do = gradient_for(args)
    got = run(args, do, **options)
    ref, gold = (run(x, do, with_masks, **options) for x in (args, [x.double() for x in args]))
    for name, *results in zip(NAMES, got, ref, gold, strict=True):
        assert_as_good_as(name, *results)


def check_without_gradient(args, **options):
    got, ref = (op(*args, scale=0.4, **options) for op in (latent_attention, with_masks))
    gold = with_masks(*(x.double() for x in args), scale=0.4, **options)
    assert_as_good_as("o", got, ref, gold)


# ---- few shapes for cuDNN ----------------------------------------------------------------------


def test_planned_lengths():
    planned = [attention.planned_length(n) for n in range(1, 2**14 + 1)]
    assert planned == sorted(planned) and len(set(planned)) == 16 * 5
    for n, found in enumerate(planned, 1):
        assert n <= found < n + max(64, n / 16)
        assert attention.planned_length(found) == found


@pytest.fixture
def shapes(monkeypatch):
    """As if cuDNN attended: keys and queries of each call of attention, and their strides."""
    found, attend, sdpa = [], mla.attend, F.scaled_dot_product_attention

    def tile(q, k, v, causal, scale, planned):
        assert planned
        found.append((q.shape[2], k.shape[2], causal))
        return attend(q, k, v, causal, scale, planned)

    def document(*qkv, **options):
        found.append([(x.shape[2], x.stride()) for x in qkv])
        return sdpa(*qkv, **options)

    monkeypatch.setattr(mla, "attend", tile)
    monkeypatch.setattr(mla, "plans", lambda *args, **options: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", document)
    return found


@pytest.mark.parametrize("B, T, S", [(1, 9, 9), (2, 65, 65)])
def test_a_prompt_of_a_new_length(B, T, S, shapes):
    """Has the plan of another one, and zeros behind it have no part in values and gradients."""
    check(make(T, S, B=B))
    lengths = [[n for n, _ in found] for found in shapes]
    assert lengths[0] == [attention.planned_length(T)] * 3
    del shapes[:]
    for n in (T, T + 20):
        latent_attention(*make(n, n, B=B), scale=0.4)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "T, S", [(20, 21), (20, 148), (70, 1000), (300, 1600), (40, 552), (20, 120), (70, 970)]
)
def test_tiles_of_few_shapes(T, S, fp8, shapes, monkeypatch):
    monkeypatch.setattr(mla, "AT_ONCE", 2 * 3 * 11 * 256)
    q, latent, w_kv = make(T, S, B=2, dtype=torch.float32)
    tokens = quantize_latents(latent, 6) if fp8 else latent
    got = latent_attention(q, tokens, w_kv, scale=0.4)
    latent = tokens.dequantize() if fp8 else latent
    args = q, latent, w_kv
    ref, gold = (with_masks(*x, scale=0.4) for x in (args, [x.double() for x in args]))
    assert_as_good_as("o", got, ref, gold)
    tiles = [x for x in shapes if isinstance(x, tuple)]
    for queries, keys, causal in tiles:
        assert queries == attention.planned_length(queries)
        assert keys == queries if causal else keys in (128, 256)
    seen = sum(keys for _, keys, causal in tiles if not causal)
    assert seen >= (S - T) // 128 * 128


def test_tiles_of_one_shape_in_pieces_of_a_prompt(shapes):
    """Which begin at multiples of their length: no more calls than there would be otherwise."""
    latent_attention(*make(256, 1024, B=1, dtype=torch.float32), scale=0.4)
    assert shapes == [(256, 256, True), (256, 512, False), (256, 256, False)]


@pytest.fixture
def takes(monkeypatch):
    """Who takes 16 bits on a GPU, from here on."""

    def choose(**who):
        for name in ("flash", "torch_flash", "cudnn"):
            found = who.get(name, False)
            monkeypatch.setattr(attention, f"_takes_{name}", lambda *_, found=found: found)

    return choose


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(
    "B, T, trains, want",
    [(1, 100, False, 100), (1, 100, True, 128), (1, 5000, False, 5120), (2, 2100, False, 2176)],
)
def test_what_is_planned(flash, B, T, trains, want, takes, monkeypatch):
    """Many tokens, or any in training."""
    found = []

    def note(q, k, v, scale):
        found.append(q.shape[2])
        return v

    takes(flash=flash, torch_flash=True, cudnn=True)
    monkeypatch.setattr(mla, "causal_attention", note)
    args = [x.requires_grad_(trains) for x in make(T, T, B=B, dtype=torch.float32)]
    latent_attention(*args, scale=0.4)
    assert found == [T if flash else want]


@pytest.mark.parametrize(
    "T, S, planned",
    [(300, 600, False), (4095, 30_000, False), (4096, 5000, True), (300, 2**20, True)],
)
def test_what_is_planned_after_others(T, S, planned, takes):
    takes(torch_flash=True, cudnn=True)
    q = torch.zeros(1).expand(1, 2, T, 6)
    assert attention.plans(q, S, 5, trains=False) == planned
    assert attention.plans(q, S, 5, trains=True)


@pytest.mark.parametrize("flash, packed", [(False, True), (False, False), (True, True)])
def test_groups_of_documents(flash, packed, takes):
    takes(flash=flash, torch_flash=packed)
    long = attention.WORTH_A_PLAN
    lengths = [5, 0, long, long + 1, 7, long - 1, 9, long]
    groups = attention.document_groups(lengths, torch.zeros(1, 1, 1, 1), 1)
    if flash or not packed:
        assert groups == [lengths]
    else:
        assert groups == [[5, 0], [long], [long + 1], [7, long - 1, 9], [long]]
    takes(cudnn=True)
    groups = attention.document_groups(lengths, torch.zeros(1, 1, 1, 1), 1)
    assert groups == [[n] for n in lengths]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_documents_in_groups(lengths, shapes, monkeypatch):

    def groups(lengths, q, D_v):
        return [list(x) for _, x in itertools.groupby(lengths, lambda n: min(n, 5))]

    monkeypatch.setattr(mla, "document_groups", groups)
    T = sum(lengths)
    check(make(T, T, B=1), cu_seqlens=ends_of(lengths))


@pytest.mark.parametrize("n", [40, 64])
def test_a_document_has_the_same_strides_in_every_row(n, shapes, takes):
    """cuDNN plans for shapes and strides, which takes longer than to run: not in each batch."""
    takes(cudnn=True)
    for more in (9, 300):
        args = make(n + more, n + more, B=1)
        latent_attention(*args, scale=0.4, cu_seqlens=ends_of([n, more]))
    assert len(shapes) == 4 and shapes[0] == shapes[2] and shapes[1] != shapes[3]


# ---- flash-attn-4 ------------------------------------------------------------------------------


def dense(q, k, v, scale, causal):
    """[tokens, heads, D] -> o, and the log-sum-exp [heads, tokens]; the mask at the lower right."""
    s = torch.einsum("thd,shd->hts", q, k) * scale
    if causal:
        T, S = s.shape[1:]
        seen = s.new_ones(T, S, dtype=torch.bool).tril(S - T)
        s = s.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shd->thd", s.softmax(-1), v), s.logsumexp(-1)


class Opaque(torch.autograd.Function):
    """`dense`, with gradients that autograd cannot look into, as those of a kernel are."""

    @staticmethod
    def forward(ctx, *args):
        ctx.args = args
        return dense(*args)

    @staticmethod
    def backward(ctx, do, _):
        *inputs, scale, causal = ctx.args
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            o, _ = dense(*leaves, scale, causal)
        return *(x.detach() for x in torch.autograd.grad(o, leaves, do.detach())), None, None


class FakeFlash:
    """flash-attn-4's two functions, written out."""

    def __init__(self):
        self.calls, self.deterministic = [], []

    def flash_attn_func(self, q, k, v, *, softmax_scale, causal, return_lse, deterministic=False):
        self.calls.append((q.shape[1], k.shape[1], causal))
        self.deterministic.append(deterministic)
        rows = [Opaque.apply(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)]
        o, lse = (torch.stack(x) for x in zip(*rows, strict=True))
        return o, lse if return_lse else None

    def flash_attn_varlen_func(
        self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        causal, return_lse, deterministic=False,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k and causal
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        self.calls.append(lengths)
        self.deterministic.append(deterministic)
        documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([Opaque.apply(*x, softmax_scale, True)[0] for x in documents]), None


@pytest.fixture
def flash(monkeypatch):
    library = FakeFlash()
    monkeypatch.setattr(attention, "_takes_flash", lambda q, D_v: True)
    monkeypatch.setattr(attention, "flash_attn", lambda: library)
    return library


@pytest.mark.parametrize("B, T, S", SHAPES)
def test_flash_attends(B, T, S, flash):
    args = make(T, S, B=B)
    check(args)
    assert flash.calls == [(T, S, True)]
    check_without_gradient(args)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_flash_attends_to_documents(lengths, flash):
    T = sum(lengths)
    check(make(T, T, B=1), cu_seqlens=ends_of(lengths))
    assert flash.calls == [lengths if len(lengths) > 1 else (T, T, True)]


def test_flash_attends_in_tiles(flash, monkeypatch):
    monkeypatch.setattr(mla, "AT_ONCE", 2 * 3 * 11 * 64)
    check_without_gradient(make(70, 333, B=2))
    assert flash.calls[:6] == [(64, 64, True), *[(64, 64, False)] * 4, (64, 7, False)]


def test_a_gradient_of_the_gradient(flash):
    """flash-attn-4 would leave it out without a word, of what autograd sees give a part."""
    args = [x.requires_grad_() for x in make(9, 9, B=1)]
    for cu_seqlens in (None, ends_of([4, 5])):
        o = latent_attention(*args, scale=0.4, cu_seqlens=cu_seqlens)
        with pytest.raises(RuntimeError, match="gradients have no gradients"):
            torch.autograd.grad(o.sum(), args, create_graph=True)


def test_deterministic_where_torch_is_told_to_be(flash):
    args = make(9, 9, B=1)
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            for cu_seqlens in (None, ends_of([4, 5])):
                latent_attention(*args, scale=0.4, cu_seqlens=cu_seqlens)
        finally:
            torch.use_deterministic_algorithms(False)
    assert flash.deterministic == [False, False, True, True]


@pytest.fixture
def fresh(monkeypatch):
    """As if nobody had asked for flash-attn-4 yet."""
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    attention.flash_attn.cache_clear()
    yield
    attention.flash_attn.cache_clear()


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn.cute"])
def test_without_flash_attn(name, fresh, monkeypatch, recwarn):
    """Nothing of that name, or FlashAttention 2 alone."""

    def find(wanted):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(attention.importlib, "import_module", find)
    assert attention.flash_attn() is None and not recwarn.list


@pytest.mark.parametrize(
    "error", [RuntimeError("No CTK flavor"), ModuleNotFoundError("No module", name="cutlass")]
)
def test_flash_attn_that_cannot_be_imported(error, fresh, monkeypatch):
    """One warning, which says why."""
    tries = []

    def find(wanted):
        tries.append(wanted)
        raise error

    monkeypatch.setattr(attention.importlib, "import_module", find)
    with pytest.warns(UserWarning, match=f"flash-attn-4 cannot be imported.*{error}"):
        assert attention.flash_attn() is None
    assert attention.flash_attn() is None and tries == ["flash_attn.cute"]


def on_gpu(**changes):
    """What `_takes_flash` looks at."""
    found = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 9, 192), "device": "cuda"}
    return SimpleNamespace(**(found | changes))


@pytest.mark.parametrize("GPU", [(9, 0), (10, 0), (8, 0)])
def test_what_flash_takes(GPU, monkeypatch):
    library = object()
    monkeypatch.setattr(attention, "flash_attn", lambda: library)
    monkeypatch.setattr(attention, "capability", lambda device: GPU)
    monkeypatch.setattr(attention, "use_triton", lambda q: True)
    takes = attention._takes_flash
    assert takes(on_gpu(), 128) == (GPU == (9, 0))
    assert takes(on_gpu(dtype=torch.float16), 128) == (GPU == (9, 0))
    for change in ({"is_cuda": False}, {"dtype": torch.float32}, {"shape": (1, 4, 9, 128)}):
        assert not takes(on_gpu(**change), 128)
    assert not takes(on_gpu(), 192)
    for name, answer in (("use_triton", False), ("flash_sdp_enabled", False)):
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, lambda *_, answer=answer: answer)
            assert not takes(on_gpu(), 128)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not takes(on_gpu(), 128)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert not takes(on_gpu(), 128)
    library = None
    assert not takes(on_gpu(), 128)
