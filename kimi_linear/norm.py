"""RMSNorm of the residual stream and of the latents."""

import torch
from torch import Tensor, nn


class KimiLinearRMSNorm(nn.Module):
    """Normalise in fp32, round to the input's dtype, then multiply by the weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_ = x.to(torch.promote_types(x.dtype, torch.float32))
        x_ = x_ * torch.rsqrt(x_.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x_.to(x.dtype)
