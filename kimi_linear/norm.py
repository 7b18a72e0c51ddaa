"""RMSNorm of the residual stream and of the latents."""

import torch
from torch import Tensor, nn

from kimi_kernels import add_rms_norm, rms_norm


class KimiLinearRMSNorm(nn.Module):
    """Normalise in fp32, round to the input's dtype, then multiply by the weight [D].

    With a residual: the norm of the sum of both, and the sum.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        if residual.dtype != x.dtype:  # under autocast
            return rms_norm(h := x + residual, self.weight, self.eps), h
        return add_rms_norm(x, residual, self.weight, self.eps)
