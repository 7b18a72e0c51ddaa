"""The machine code of the chunk kernels for Hopper (sm_90), compiled here without a GPU.

ptxas 12.8, which comes with Triton 3.6 and 3.7, sometimes builds the 64-bit descriptor of a `wgmma`
operand from one register for both of its words. The product then reads outside its shared memory,
now and then with a fault and mostly with wrong numbers, so this looks at what it made of every
kernel. As a script it is the compiling process: in a test process the interpreter may be active.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024  # bytes for one program
CASES = {  # tokens, K = V, raw, packed
    "raw": (8192, 128, True, False),
    "raw-packed": (8192, 128, True, True),
    "given-packed": (8192, 128, False, True),
    "K=64": (8192, 64, True, False),
    "exact": (256, 128, True, False),
}


def broken_descriptors(sass: str) -> list[str]:
    """Where the low and the high word of a descriptor come from one register.

        UIADD3    UR34, UP0, UR5, 0x40, URZ
        UIADD3.X  UR35, UR5, 0x40000040, URZ, UP0, !UPT        and UR5 not written in between

    The upper two bits of the high word are the swizzle, which is never none.
    """
    broken, low = [], {}  # carry -> the register that its sum came from
    for line in sass.splitlines():
        line = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+) +(.*?);", line)
        if not line:
            continue
        address, op, args = line.groups()
        x = re.match(r"UR\d+, (UR\d+), (-?0x\w+), URZ, (UP\d)", args)
        if op == "UIADD3.X" and x and low.get(x[3]) == x[1] and int(x[2], 16) & 0xC0000000:
            broken.append(f"{address}: {x[2]} on {x[1]}")
        x = re.match(r"UR\d+, (UP\d), (UR\d+), -?0x", args)
        if op == "UIADD3" and x:
            low[x[1]] = x[2]
        out = re.match(r"UR(\d+)\b", args)
        if out:
            written = {f"UR{int(out[1]) + i}" for i in range(1 + (".64" in op))}
            low = {carry: register for carry, register in low.items() if register not in written}
    return broken


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


def tool() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, tmp_path):
    """A process per case: they run side by side, and what they share is in Triton's cache."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.test_sm90_code", case, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    products, faults, facts = 0, [], []
    for name, shared in kernels:
        dump = subprocess.run(
            [tool(), "-res-usage", "-sass", str(tmp_path / f"{name}.cubin")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        used = dict(re.findall(r"\b(REG|STACK):(\d+)", dump))
        broken, count = broken_descriptors(dump), len(re.findall(r"\bHGMMA\b", dump))
        fact = f"{name}: {used['REG']} registers, {used['STACK']} bytes of stack, {shared} shared"
        facts.append(f"{fact}, {count} HGMMA")
        if broken or shared > SHARED or int(used["REG"]) > 255:
            faults.append(f"{facts[-1]}, broken descriptors {broken}")
        products += count
    assert not faults, "\n".join([*faults, "of", *facts])
    assert len(kernels) >= 7 and products > 50, facts


# ---- the compiling process ---------------------------------------------------------------------


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_case(case: str, folder: Path) -> None:
    """Every kernel that forward and backward launch: its cubin, and its name and shared memory."""
    import triton
    from triton.runtime.jit import JITFunction

    from kimi_kernels import dispatch

    dispatch.capability = lambda device: (9, 0)
    from kimi_kernels.kda.chunk_bwd import chunk_kda_bwd
    from kimi_kernels.kda.chunk_fwd import chunk_kda_fwd

    triton.runtime.driver.set_active(Hopper())
    run, compiled = JITFunction.run, {}

    def compile_only(self, *args, warmup, **options):
        kernel = run(self, *args, warmup=True, **options)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
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
    facts = []
    for i, kernel in enumerate(compiled.values()):
        facts.append((f"{i}-{kernel.metadata.name}", kernel.metadata.shared))
        (folder / f"{facts[-1][0]}.cubin").write_bytes(kernel.asm["cubin"])
    print(json.dumps(facts))


if __name__ == "__main__":
    compile_case(sys.argv[1], Path(sys.argv[2]))
