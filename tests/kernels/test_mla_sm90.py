"""The machine code of the decoding kernels of latent attention for Hopper, without a GPU.

As test_sm90_code.py does for KDA. As a script it is the compiling process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.test_sm90_code import ROOT, Hopper, broken_descriptors, tool

CASES = {  # first kernel: sequences, new tokens, heads, are there positions, dtype, KB to share
    "latent_decode_gluon": {
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
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.test_mla_sm90", kernel, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert [x[:2] for x in compiled] == [
        [case, name] for case in CASES[kernel] for name in (kernel, "latent_combine_kernel")
    ]
    for i, (case, name, shared) in enumerate(compiled):
        _, T, H, _, dtype, room = CASES[kernel][case]
        dump = subprocess.run(
            [tool(), "-res-usage", "-sass", str(tmp_path / f"{i}.cubin")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        stack = re.search(r"\bSTACK:(\d+)", dump)
        assert not broken_descriptors(dump), (case, name)
        assert shared <= room * 1024, (case, name, shared)
        assert stack and int(stack[1]) <= 32, (case, name, stack)
        instructions = re.findall(r"\b([A-Z]\w+)", dump)
        if dtype == "float32":  # exact products
            assert "HGMMA" not in instructions and "HMMA" not in instructions
        if name == "latent_decode_gluon":
            # 36 products of 16 channels; 4 of 16 latents for each 64 channels of a warpgroup
            assert instructions.count("HGMMA") == 36 + (32 if T * H <= 32 else 16)
            assert "UTMALDG" in instructions and "HMMA" not in instructions


def compile_cases(kernel: str, folder: Path) -> None:
    """Both kernels of each case: their cubins, and case, name and shared memory."""
    import triton
    from triton.runtime.jit import JITFunction

    from kimi_kernels import dispatch

    dispatch.capability = lambda device: (9, 0)
    from kimi_kernels import mla_decode_gluon, mla_decode_triton

    triton.runtime.driver.set_active(Hopper())
    run, compiled, facts = JITFunction.run, [], []

    def compile_only(self, *args, warmup, **options):
        compiled.append(run(self, *args, warmup=True, **options))

    JITFunction.run = compile_only
    if kernel == "latent_decode_kernel":
        mla_decode_gluon.takes = lambda *args: False
    for case, (B, T, H, ragged, dtype, room) in CASES[kernel].items():
        compiled.clear()
        mla_decode_triton.device_limits = lambda device, room=room: (132, room * 1024)
        shapes = (B, T, H, 192), (B, 4096, 576), (H * 256, 512)
        args = [torch.empty(s, dtype=getattr(torch, dtype), device="meta") for s in shapes]
        positions = torch.empty(B, T, dtype=torch.int64, device="meta") if ragged else None
        mla_decode_triton.latent_decode_fwd(*args, 192**-0.5, positions)
        for x in compiled:
            (folder / f"{len(facts)}.cubin").write_bytes(x.asm["cubin"])
            facts.append((case, x.metadata.name, x.metadata.shared))
    print(json.dumps(facts))


if __name__ == "__main__":
    compile_cases(sys.argv[1], Path(sys.argv[2]))
