"""The machine code of the decode step of KDA, for Hopper, without a GPU.

As test_sm90_code.py does for the other kernels of KDA. As a script it is the compiling process.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.sm90 import compile_in_child, record, write


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_machine_code(dtype, tmp_path):
    """S, 128 registers of each thread, stays there, and the next kernel may begin early."""
    (step,) = compile_in_child(__name__, tmp_path, dtype)
    assert step.name == "kda_step_kernel"
    assert step.stack == 0 and step.words["ACQBULK"] == 1 and step.early, str(step)
    assert step.shared <= 4096, str(step)  # vectors, not S


def compile_cases(dtype: str, folder: Path) -> None:
    compiled = record()
    from kimi_kernels.kda.step import kda_step_fwd

    own, f32 = getattr(torch, dtype), torch.float32

    def empty(*shape: int, dtype: torch.dtype = own) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, H, K = 1, 1, 32, 128
    D = 3 * H * K
    xs, f, gate = [empty(B, T, H * K)] * 3, empty(B, T, H, K), empty(B, T, H, K)
    A_log, dt_bias, S = (empty(*s, dtype=f32) for s in ((H,), (H * K,), (B, H, K, K)))
    b, norm = empty(B, T, H), empty(K)
    kda_step_fwd(xs, empty(D, 4), empty(B, 3, D), f, b, A_log, dt_bias, S, gate, norm, 1e-5)
    write([(x.metadata.name, x) for x in compiled], folder)


if __name__ == "__main__":
    compile_cases(sys.argv[1], Path(sys.argv[2]))
