"""The machine code of the decoding kernels of latent attention for Hopper, without a GPU.

As test_sm90_code.py does for KDA. As a script it is the compiling process.
"""

import sys
from pathlib import Path

import pytest
import torch

from kimi_kernels.linears import MOST_ROWS
from tests.kernels.sm90 import compile_in_child, record, write

CASES = {  # first kernel: sequences, new tokens, heads, are there positions, dtype, KB to share
    "latent_decode_gluon": {
        "one token": (1, 1, 32, False, "bfloat16", 227),
        "ragged": (32, 1, 32, True, "float16", 227),
        "many sequences": (1024, 1, 32, True, "bfloat16", 227),
        "two tokens": (8, 2, 32, True, "bfloat16", 227),
        "eight heads": (1, 1, 8, True, "bfloat16", 227),
    },
    "latent_fp8_gluon": {
        "one token": (1, 1, 32, False, "bfloat16", 227),
        "ragged": (32, 1, 32, True, "float16", 227),
        "many sequences": (1024, 1, 32, True, "bfloat16", 227),
        "two tokens": (8, 2, 32, True, "bfloat16", 227),
        "eight heads": (1, 1, 8, True, "bfloat16", 227),
    },
    "latent_decode_kernel": {
        "ragged": (32, 1, 32, True, "bfloat16", 227),
        "ragged, 99 KB": (32, 1, 32, True, "float16", 99),
        "eight heads, 99 KB": (1, 1, 8, True, "bfloat16", 99),
        "fp32": (1, 1, 32, True, "float32", 227),
        "fp32, 99 KB": (1, 1, 32, True, "float32", 99),
    },
}


@pytest.mark.parametrize("kernel", CASES)
def test_machine_code(kernel, tmp_path):
    """One process for the cases of a kernel: most of its time goes to imports."""
    kernels = compile_in_child(__name__, tmp_path, kernel)
    wanted = []
    for case, (B, T, *_) in CASES[kernel].items():
        names = kernel, "latent_combine_kernel"
        names = ("absorb_kernel", *names, "expand_kernel") if B * T <= MOST_ROWS else names
        wanted += [(case, name) for name in names]
    assert [(x.case, x.name) for x in kernels] == wanted
    for x in kernels:
        _, T, H, _, dtype, room = CASES[kernel][x.case]
        stack = 32
        if x.name == "latent_fp8_gluon":
            stack, room = 64, 113 if T * H <= 32 else 227  # for two programs, or one
        assert not x.broken and x.shared <= room * 1024 and x.stack <= stack, str(x)
        # all but the decoding itself
        assert x.words["PREEXIT"] and x.early == (x.name != kernel), str(x)
        if dtype == "float32":  # exact products
            assert not x.words["HGMMA"] and not x.words["HMMA"]
        if x.name == "latent_decode_gluon":
            # 36 products of 16 channels; 4 of 16 latents for each 64 channels of a warpgroup
            assert x.words["HGMMA"] == 36 + (32 if T * H <= 32 else 16)
            assert x.words["UTMALDG"] and not x.words["HMMA"]
        if x.name == "latent_fp8_gluon":
            # 16 products of 32 channels, 4 of 16; one for each load of four registers, of even
            # channels and of odd ones
            loads = 16 if T * H <= 32 else 8
            assert x.words["QGMMA"] == 16 and x.words["HGMMA"] == 4 + 2 * loads
            assert x.words["LDSM"] == loads and x.words["UNPACK_B"] == 8 * loads
            assert x.words["UTMALDG"] and not x.words["HMMA"]


def compile_cases(kernel: str, folder: Path) -> None:
    """Both kernels of each case."""
    compiled, kernels = record(), []
    from kimi_kernels import mla_decode_gluon, mla_decode_triton
    from kimi_kernels.latents import FP8, QuantizedLatents

    if kernel == "latent_decode_kernel":
        mla_decode_gluon.takes = lambda *args: False
    for case, (B, T, H, ragged, dtype, room) in CASES[kernel].items():
        compiled.clear()
        mla_decode_triton.device_limits = lambda device, room=room: (132, room * 1024)
        shapes = (B, T, H, 192), (B, 4096, 576), (H * 256, 512)
        args: list = [torch.empty(s, dtype=getattr(torch, dtype), device="meta") for s in shapes]
        if kernel == "latent_fp8_gluon":
            c, k_r = args[1].split((512, 64), -1)
            scale = torch.empty(c.shape[:2], dtype=torch.float32, device="meta")
            args[1] = QuantizedLatents(torch.empty_like(c, dtype=FP8), k_r, scale)
        positions = torch.empty(B, T, dtype=torch.int64, device="meta") if ragged else None
        mla_decode_triton.latent_decode_fwd(*args, 192**-0.5, positions)
        kernels += [(case, x) for x in compiled]
    write(kernels, folder)


if __name__ == "__main__":
    compile_cases(sys.argv[1], Path(sys.argv[2]))
