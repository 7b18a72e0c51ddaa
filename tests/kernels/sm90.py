"""Machine code for Hopper (sm_90), compiled without a GPU: what the tests that look at it share.

In a test process the interpreter may be active, so each such test is a script as well: run by
`compile_in_child`, it launches kernels after `record()` and hands them back with `write`.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024  # bytes for one program


class Code(NamedTuple):
    """What became of a kernel."""

    case: str
    name: str
    shared: int  # bytes, as the stack
    registers: int
    stack: int
    words: Counter[str]  # of the dump; HGMMA counts HGMMA.64x32x16.F32.BF16, too
    broken: list[str]  # descriptors
    early: bool  # lets the next kernel begin (PREEXIT) before it has waited (ACQBULK)

    def __str__(self) -> str:
        return (
            f"{self.case}, {self.name}: {self.registers} registers, {self.stack} bytes of stack, "
            f"{self.shared} shared, {self.words['HGMMA']} HGMMA, broken descriptors {self.broken}"
        )


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


# ---- the test process --------------------------------------------------------------------------


def compile_in_child(module: str, folder: Path, *args: str) -> list[Code]:
    """The kernels that `module`, as a script with `args` and the folder, has written to it."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", module, *args, str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    cubins = (folder / f"{i}.cubin" for i in range(len(facts)))
    with ThreadPoolExecutor(2) as pool:
        return [code(sass, *fact) for fact, sass in zip(facts, pool.map(dump, cubins), strict=True)]


def dump(cubin: Path) -> str:
    """Resources and instructions of a kernel, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-res-usage", "-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code(sass: str, case: str, name: str, shared: int) -> Code:
    """By what `dump` gave and the child printed."""
    used = re.search(r"\bREG:(\d+) STACK:(\d+)", sass)
    assert used, f"{case}, {name}: no resources in its dump"
    words = Counter(re.findall(r"\b[A-Z]\w+", sass))
    early = "PREEXIT" in sass.partition("ACQBULK")[0]
    broken = broken_descriptors(sass)
    return Code(case, name, shared, int(used[1]), int(used[2]), words, broken, early)


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


def record() -> list:
    """From now on launches compile for Hopper and no more; the kernels, in their order.

    To be called before a module with kernels is imported.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from kimi_kernels import dispatch

    dispatch.capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(Hopper())
    run, compiled = JITFunction.run, []

    def compile_only(self, *args, warmup, **options):
        compiled.append(run(self, *args, warmup=True, **options))

    JITFunction.run = compile_only
    return compiled


def write(compiled: Iterable[tuple[str, Any]], folder: Path) -> None:
    """The cubin of every kernel, which comes with its case; prints what else there is to know."""
    facts = []
    for case, kernel in compiled:
        (folder / f"{len(facts)}.cubin").write_bytes(kernel.asm["cubin"])
        facts.append((case, kernel.metadata.name, kernel.metadata.shared))
    print(json.dumps(facts))
