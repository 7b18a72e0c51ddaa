"""Launches the Triton forward of chunkwise KDA, for inference and as part of the backward pass."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_kernels.dispatch import device_limits
from kimi_kernels.kda import intra_gluon
from kimi_kernels.kda.chunk_kernels import kda_inter_kernel, kda_intra_kernel
from kimi_kernels.kda.gate_triton import GATE_BOUNDED, gate_mode
from kimi_kernels.kda.reference import tree_matrices
from kimi_kernels.sequences import CHUNK, chunk_table, token_rows

SCRATCH_TOKENS = 1 << 20  # tokens x heads per segment: 1.1 GB of scratch for K = V = 128
BACKWARD_TOKENS = 1 << 18  # the same where gradients are wanted; must not differ between the passes
MIN_KV, MAX_K = 16, 128
MIN_PART = 64  # chunks in a part of a split sequence


def _make_masks(device: torch.device, dtype: torch.dtype, transposed: bool) -> Tensor:
    """[8, C, C] of 0 and 1: levels 0-5 of the tree, 6 the inclusive cumsum, 7 what follows."""
    levels, LOW, UP = tree_matrices(device, dtype)
    masks = torch.stack([M for M, _ in levels] + [LOW, UP])
    return masks.mT.contiguous() if transposed else masks


_cached_masks = functools.lru_cache(_make_masks)


def anchor_masks(device: torch.device, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The masks of `device`, kept, except under CUDA-graph capture, whose memory is the graph's."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _make_masks(device, dtype, transposed)
    return _cached_masks(device, dtype, transposed)


class Chunks:
    """One call on the GPU: where its tokens and chunks lie, and scratch for a segment of chunks.

    Arguments as `chunk_kda_fwd`. Scratch [chunks of a segment, HV, ...]: qg, kg, w [C, BK], M and
    A_qk [C, C] in the dtype of q, in fp32 if `exact`; decay [BK] and beta [C] in fp32; for the
    backward pass also the factors `norms` [2, C] of q and k, or A_kk [C, C] if these were not
    normalised, in fp32. `exact`: `intra` and `inter` in fp32 for all inputs.
    """

    def __init__(
        self, q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens,
        *, segment: int, backward: bool = False, exact: bool = False,
    ):  # fmt: skip
        B, T, H, K = q.shape
        HV, V = v.shape[2:]
        self.raw, self.scale, self.cu_seqlens = A_log is not None, scale, cu_seqlens
        exact = exact or q.dtype == torch.float32
        self.ST = torch.float32 if exact else q.dtype
        self.DT, self.prec = (torch.float32, "tf32x3") if exact else (torch.float16, "ieee")
        BK = max(64, triton.next_power_of_2(K))  # smaller: illegal accesses (Triton 3.6)
        self.offsets = self.owner = None
        self.N, self.NT, self.device = B, triton.cdiv(T, CHUNK), q.device
        self.total = B * self.NT
        if cu_seqlens is not None:
            self.N = cu_seqlens.numel() - 1
            self.offsets, self.owner = chunk_table(cu_seqlens, T)
            self.total = self.owner.numel()
        rows = [token_rows(x) for x in (q, k, g, beta)]
        self.inputs, self.strides = (*(x for x, _ in rows), A_log, dt_bias), [s for _, s in rows]
        self.v, self.s_v = token_rows(v)
        self.lower_bound = 0.0 if lower_bound is None else lower_bound
        self.S_in = None if initial_state is None else initial_state.contiguous()
        self.T, self.sizes = T, {"HV": HV, "K": K, "BK": BK, "VARLEN": cu_seqlens is not None}
        self.H, self.V, self.gate = H, V, gate_mode(A_log, lower_bound)
        self.segment = segment_chunks(self.total, segment, HV)
        self.gluon = not exact and intra_gluon.takes(q.device, q.dtype, K, self.raw)
        self.qg, self.kg, self.w = (self.scratch(CHUNK, BK) for _ in range(3))
        self.M, self.A_qk = (self.scratch(CHUNK, CHUNK) for _ in range(2))
        self.decay, self.beta = (self.scratch(n, dtype=torch.float32) for n in (BK, CHUNK))
        self.norms = self.A_kk = None
        if backward and self.raw:
            self.norms = self.scratch(2, CHUNK, dtype=torch.float32)
        elif backward:
            self.A_kk = self.scratch(CHUNK, CHUNK, dtype=torch.float32)

    @functools.cached_property
    def masks(self) -> Tensor:
        """Only where they are read: a CUDA graph builds them anew at every replay."""
        return anchor_masks(self.device, self.DT)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """[chunks of a segment, HV, *shape]."""
        shape = (self.segment, self.sizes["HV"], *shape)
        return torch.empty(shape, dtype=dtype or self.ST, device=self.device)

    def segments(self) -> list[tuple[int, int]]:
        """Chunks c0..c1 of each; one segment without chunks where there are no tokens."""
        starts = range(0, max(self.total, 1), self.segment)
        return [(c0, min(c0 + self.segment, self.total)) for c0 in starts]

    def intra(self, c0: int, c1: int) -> None:
        if c1 == c0:
            return
        if self.gluon:
            sizes = {x: self.sizes[x] for x in ("HV", "K", "VARLEN")}
            intra_gluon.kda_intra_gluon[((c1 - c0) * self.sizes["HV"],)](
                *self.inputs,
                self.qg, self.kg, self.w, self.M, self.A_qk, self.decay, self.beta, self.norms,
                self.cu_seqlens, self.offsets, self.owner,
                self.T, self.NT, c0, self.scale, self.lower_bound, *self.strides,
                H=self.H, **sizes, BOUNDED=self.gate == GATE_BOUNDED,
                num_warps=4, maxnreg=intra_gluon.MAX_REGISTERS,
            )  # fmt: skip
            return
        kda_intra_kernel[((c1 - c0) * self.sizes["HV"],)](
            *self.inputs, self.masks,
            self.qg, self.kg, self.w, self.M, self.A_qk, self.decay, self.beta,
            self.norms, self.A_kk, self.cu_seqlens, self.offsets, self.owner,
            self.T, self.NT, c0, self.scale, self.lower_bound, *self.strides,
            H=self.H, **self.sizes, GATE=self.gate, RAW=self.raw,
            DT=tl.float32 if torch.float32 == self.DT else tl.float16, PREC=self.prec,
            num_warps=4, num_stages=1,
        )  # fmt: skip

    def inter(self, c0: int, c1: int, o=None, S=None, border=None, S_all=None, e_all=None) -> None:
        """`o` and `S`, or `S_all` and `e_all`; see the kernel."""
        spans = (self.N, self.cu_seqlens, self.offsets)
        self.scan(c0, c1, spans, self.v, self.S_in, o, S, border, S_all, e_all)

    def scan(self, c0, c1, spans, v, S_in, o=None, S=None, border=None, S_all=None, e_all=None):
        """`inter` over N spans of chunks, of the tokens cu_seqlens and the chunks offsets."""
        (N, cu_seqlens, offsets), V = spans, self.sizes["K"] if v is None else self.V
        BV, stages = inter_config(self.sizes["BK"], self.ST)
        kda_inter_kernel[(triton.cdiv(V, BV) * N * self.sizes["HV"],)](
            v, self.w, self.M, self.qg, self.kg, self.A_qk, self.decay, self.beta,
            o, S_in, S, border, S_all, e_all, cu_seqlens, offsets,
            self.T, self.NT, c0, c1, self.s_v,
            V=V, **self.sizes | {"VARLEN": cu_seqlens is not None}, BV=BV, PREC=self.prec,
            STAGES=stages, HAS_S=S_in is not None, num_warps=4,
        )  # fmt: skip

    def split_inter(self, c0: int, c1: int, parts: int, o: Tensor, S: Tensor) -> None:
        """`inter` for one sequence in parts at the same time: three passes instead of one.

        What a part makes of S is P S + R. P and R of all parts come first, from S = 1 without v and
        from S = 0; then the S before each part, and with these the outputs.
        """
        size = triton.cdiv(c1 - c0, parts)
        starts = torch.arange(c0, c1 + size, size, dtype=torch.int32, device=self.device)
        starts = starts.clamp(max=c1)
        spans = len(starts) - 1, (starts * CHUNK).clamp(max=self.T), starts
        HV, K = self.sizes["HV"], self.sizes["K"]
        P, R = (S.new_empty(spans[0], HV, K, n) for n in (K, self.V))
        self.scan(c0, c1, spans, None, None, S=P)
        self.scan(c0, c1, spans, self.v, None, S=R)
        before = torch.empty_like(R)
        before[0] = S[0] if c0 else 0 if self.S_in is None else self.S_in[0]
        for n in range(1, len(R)):
            torch.baddbmm(R[n - 1], P[n - 1], before[n - 1], out=before[n])
        self.scan(c0, c1, spans, self.v, before, o, R)
        S[0] = R[-1]


def chunk_kda_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    lower_bound: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, HV, V] in `v.dtype` and the final states [N, HV, K, V] fp32; arguments are checked.

    Third, for the backward pass, the states between its segments [segments - 1, HV, K, V] fp32.

    K is at most MAX_K: three tiles of 64 x 256 do not fit in shared memory twice. K and V are at
    least MIN_KV: with both 1, Triton 3.6 compiled wrong results.
    With `A_log` and `dt_bias`, `g` and `beta` are raw and q and k are normalised (`fused_kda`).
    """
    args = (q, k, v, g, beta, A_log, dt_bias, scale, lower_bound, initial_state, cu_seqlens)
    x = Chunks(*args, segment=BACKWARD_TOKENS if for_backward else SCRATCH_TOKENS)
    segments = x.segments()
    state = v.shape[2], q.shape[3], v.shape[3]
    S = torch.empty(x.N, *state, dtype=torch.float32, device=q.device)
    borders = S.new_empty(len(segments) - 1 if for_backward else 0, *state)
    o = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    for i, (c0, c1) in enumerate(segments):
        x.intra(c0, c1)
        parts = 1 if x.total > x.NT or for_backward else count_parts(x, c1 - c0)
        if parts > 1:
            x.split_inter(c0, c1, parts, o, S)
        else:
            x.inter(c0, c1, o, S, borders[i] if i < len(borders) else None)
    return o, S, borders


def count_borders(B: int, T: int, HV: int, packed: int | None) -> int:
    """States between the segments of the backward pass, for that many packed sequences."""
    total = B * triton.cdiv(T, CHUNK) if packed is None else T // CHUNK + packed
    return max(0, triton.cdiv(total, segment_chunks(total, BACKWARD_TOKENS, HV)) - 1)


def segment_chunks(total: int, tokens: int, HV: int) -> int:
    """Chunks per segment of `tokens` tokens x heads."""
    return max(1, min(total, tokens // (CHUNK * HV)))


def count_parts(x: Chunks, chunks: int) -> int:
    """Parts of a sequence of that many chunks that fill the GPU with programs of `inter`.

    Each chunk is then scanned three times, so that under four parts nothing is won.
    """
    if x.device.type != "cuda" or x.cu_seqlens is not None:
        return 1
    programs = x.sizes["HV"] * triton.cdiv(x.V, inter_config(x.sizes["BK"], x.ST)[0])
    fill = device_limits(x.device).processors // programs
    parts = min(fill, chunks // MIN_PART)
    return parts if parts >= 4 else 1


def inter_config(BK: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tile of V and pipeline stages of `inter`, and of `reverse` in the backward pass.

    Three stages of the chunk's tiles must fit in 227 KB of shared memory: 222 KB for K = 128 and
    tiles of 32. Two stages take 1.8 times as long (1 x 8192 x 32 on an H200: .306 against .170 ms).
    """
    return 32, 3 if BK * dtype.itemsize <= 256 else 2
