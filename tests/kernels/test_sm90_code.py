"""The machine code of the chunk kernels for Hopper (sm_90), compiled here without a GPU.

ptxas 12.8, which comes with Triton 3.6 and 3.7, sometimes builds the 64-bit descriptor of a `wgmma`
operand from one register for both of its words. The product then reads outside its shared memory,
now and then with a fault and mostly with wrong numbers, so this looks at what it made of every
kernel. As a script it is the compiling process, see sm90.py.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.sm90 import SHARED, broken_descriptors, compile_in_child, record, write

CASES = {  # tokens, K = V, raw, packed
    "raw": (8192, 128, True, False),
    "raw-packed": (8192, 128, True, True),
    "given-packed": (8192, 128, False, True),
    "K=64": (8192, 64, True, False),
    "exact": (256, 128, True, False),
}


GOOD = """
    /*1b50*/  UIADD3 UR14, UP0, UR8, 0x2, URZ ;
    /*1b60*/  UIADD3 UR16, UP1, UR10, 0x40, URZ ;
    /*1b70*/  UIADD3.X UR15, UR12, 0x40000040, URZ, UP0, !UPT ;
    /*1b80*/  UIADD3.X UR17, UR13, -0x7fffffe0, URZ, UP1, !UPT ;
    /*1b90*/  UIADD3.64 UR18, UR14, 0x40, URZ ;
    /*3810*/  UIADD3 UR26, UP0, UR24, 0x40, URZ ;
    /*3820*/  UMOV UR24, URZ ;
    /*3830*/  UIADD3.X UR27, UR24, -0x7fffffe0, URZ, UP0, !UPT ;
    /*3840*/  UIADD3 UR38, UP0, UR34, 0x40, URZ ;
    /*3850*/  UIADD3.X UR39, UR35, URZ, URZ, UP0, !UPT ;
    /*3860*/  UIADD3 UR40, UP0, UR5, 0x40, URZ ;
    /*3870*/  UIADD3.64 UR4, UR10, 0x40, URZ ;
    /*3880*/  UIADD3.X UR41, UR5, 0x40000040, URZ, UP0, !UPT ;
"""
BAD = """
    /*3e40*/  HGMMA.64x32x16.F32.BF16 R52, gdesc[UR28].tnspB, RZ, !UPT ;
    /*3e50*/  UIADD3 UR34, UP0, UR5, 0x40, URZ ;
    /*3e60*/  UIADD3 UR32, UP1, UR28, 0x2, URZ ;
    /*3e70*/  UMOV UR24, URZ ;
    /*3e80*/  UIADD3.X UR35, UR5, {high}, URZ, UP0, !UPT ;
    /*3e90*/  UIADD3.X UR33, UR24, 0x40000040, URZ, UP1, !UPT ;
"""


def test_good_descriptors():
    assert broken_descriptors(GOOD) == []


@pytest.mark.parametrize("high", ["0x40000040", "-0x7fffffe0", "-0x3ffffff0"])
def test_broken_descriptors(high):
    assert broken_descriptors(BAD.format(high=high)) == [f"3e80: {high} on UR5"]


@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, tmp_path):
    """A process per case: they run side by side, and what they share is in Triton's cache."""
    kernels = compile_in_child(__name__, tmp_path, case)
    faults = [x for x in kernels if x.broken or x.shared > SHARED or x.registers > 255]
    facts = "\n".join(map(str, [*faults, "of", *kernels]))
    assert not faults, facts
    assert len(kernels) >= 7 and sum(x.words["HGMMA"] for x in kernels) > 50, facts


def compile_case(case: str, folder: Path) -> None:
    """Every kernel that forward and backward launch, once."""
    compiled = record()
    from kimi_kernels.kda.chunk_bwd import chunk_kda_bwd
    from kimi_kernels.kda.chunk_fwd import chunk_kda_fwd

    T, D, raw, packed = CASES[case]
    H = 32

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, g = (tensor(1, T, H, D) for _ in range(4))
    N = 3 if packed else 1
    S, borders = (tensor(n, H, D, D, dtype=torch.float32) for n in (N, 0))
    gate = (tensor(H, dtype=torch.float32), tensor(H * D, dtype=torch.float32))
    cu_seqlens = tensor(N + 1, dtype=torch.int32) if packed else None
    scalars = (D**-0.5, None, S, cu_seqlens)
    args = (q, k, v, g, tensor(1, T, H), *(gate if raw else (None, None)), *scalars)
    chunk_kda_fwd(*args, for_backward=True)
    chunk_kda_bwd(*args, tensor(*v.shape), borders, tensor(*v.shape), S)
    write([(case, kernel) for kernel in {x.hash: x for x in compiled}.values()], folder)


if __name__ == "__main__":
    compile_case(sys.argv[1], Path(sys.argv[2]))
