"""The one numerical rule of the test-suite, and what the kernels are tested on."""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_kernels.dispatch import overlapping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # on a CPU the kernels run in Triton's interpreter, whose bf16 is wrong
    KERNEL_DTYPES.append(torch.bfloat16)

FLOOR = {  # relative RMS error; one machine epsilon of the 16-bit dtypes
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def rel_err(a: Tensor, gold: Tensor) -> float:
    """RMS(a - gold) / RMS(gold); 0 for tensors without elements."""
    if gold.numel() == 0:
        return 0.0
    a, gold = a.double(), gold.double()
    return ((a - gold).square().mean().sqrt() / gold.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_as_good_as(
    name: str, got: Tensor, ref: Tensor, gold: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`got` may be at most twice as far from `gold` (fp64) as `ref` (PyTorch, same dtype).

    Or as far as the FLOOR of `dtype`, if that is more: the dtype of the op's inputs, which is that
    of `got` by default. A state comes out in fp32 from products in bf16.
    """
    assert got.shape == gold.shape and got.dtype == ref.dtype, name
    assert torch.isfinite(got).all(), f"{name}: not finite"
    err, limit = rel_err(got, gold), max(2 * rel_err(ref, gold), FLOOR[dtype or got.dtype])
    assert err <= limit, f"{name}: error {err:.2e} > {limit:.2e}"


def check_early_launches(
    chain: Callable[[Tensor], Tensor], x: Tensor, before: Callable[[], object] | None = None
) -> None:
    """The kernels of `chain` give the same bits when each begins early, also in a CUDA graph.

    `before` each of twenty replays.
    """
    want, graph = chain(x), torch.cuda.CUDAGraph()
    with overlapping():
        assert torch.equal(chain(x), want)
        with torch.cuda.graph(graph):
            got = chain(x)
    for _ in range(20):
        if before is not None:
            before()
        graph.replay()
        assert torch.equal(got, want)
