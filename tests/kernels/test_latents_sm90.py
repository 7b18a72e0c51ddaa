"""The machine code of the kernel that stores latents, for Hopper, without a GPU.

As test_sm90_code.py does for KDA. As a script it is the compiling process.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.sm90 import compile_in_child, record, write


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_machine_code(dtype, tmp_path):
    """The sum of a norm is dealt to threads as in rms_norm, so that it is the same to the bit."""
    norm, *stores = compile_in_child(__name__, tmp_path, dtype)
    assert [x.name for x in (norm, *stores)] == [
        "rms_norm_fwd_kernel",
        *["store_latents_kernel"] * 2,
    ]
    for x in stores:
        assert x.case == norm.case and x.stack == 0 and x.registers <= 64, str(x)
        assert x.words["ACQBULK"] == 1  # it waits for the kernel before, and begins early


def layout_of_sum(kernel) -> str:
    """Of the first reduction of fp32."""
    ir = kernel.asm["ttgir"]
    name = re.search(r"\(tensor<\d+x\d+xf32, (#\w+)>\) ->", ir)
    layout = name and re.search(rf"^{name[1]} = (.*)$", ir, re.M)
    assert layout, ir
    return layout[1]


def compile_cases(dtype: str, folder: Path) -> None:
    """rms_norm of a prompt's c, and the stores of a decode step, at the released sizes."""
    compiled = record()
    from kimi_kernels.latents import FP8, QuantizedLatents
    from kimi_kernels.latents_triton import store_latents_triton
    from kimi_kernels.rms_norm_triton import rms_norm_fwd

    own = getattr(torch, dtype)

    def tensor(*shape, dtype=own):
        return torch.empty(shape, dtype=dtype, device="meta")

    R, P, B, S = 512, 64, 2, 4096
    weight, columns = tensor(R), tensor(B, dtype=torch.int64)
    rms_norm_fwd(tensor(1000, R), None, weight, 1e-6)
    scale = tensor(B, S, dtype=torch.float32)
    fp8 = QuantizedLatents(tensor(B, S, R, dtype=FP8), tensor(B, S, P), scale)
    for into in (tensor(B, S, R + P), fp8):
        store_latents_triton(tensor(B, R + P), into, None, columns, (weight, 1e-6), R)
    write([(layout_of_sum(x), x) for x in compiled], folder)


if __name__ == "__main__":
    compile_cases(sys.argv[1], Path(sys.argv[2]))
