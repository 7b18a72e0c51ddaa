"""The one numerical rule of the test-suite."""

import torch
from torch import Tensor

FLOOR = {  # relative RMS error
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def rel_err(a: Tensor, gold: Tensor) -> float:
    """RMS(a - gold) / RMS(gold); 0 for tensors without elements."""
    if gold.numel() == 0:
        return 0.0
    a, gold = a.double(), gold.double()
    return ((a - gold).square().mean().sqrt() / gold.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_as_good_as(name: str, got: Tensor, ref: Tensor, gold: Tensor) -> None:
    """`got` may be at most twice as far from `gold` (fp64) as `ref` (PyTorch, same dtype)."""
    assert got.shape == gold.shape and got.dtype == ref.dtype, name
    assert torch.isfinite(got).all(), f"{name}: not finite"
    err, limit = rel_err(got, gold), max(2 * rel_err(ref, gold), FLOOR[got.dtype] / 4)
    assert err <= limit, f"{name}: error {err:.2e} > {limit:.2e}"
