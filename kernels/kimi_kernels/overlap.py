"""Kernels that begin while the one before them runs: programmatic dependent launch, on Hopper.

Between two small kernels a GPU is idle for 2 us, and each then starts by fetching weights. Inside
of `dispatch.overlapping` a kernel is launched, and reads its weights, while the one before works:

    what no kernel writes       weights; what the kernels before the last one have written
    wait_for_inputs             all that came before has ended, the next kernel may begin
    everything else

Every kernel of such a chain passes `wait_for_inputs` in each of its programs. So whatever stands
before it may count on all kernels but the one just before; and where that one is `EARLY` not on
the one before it either, and so on. `kda_step` counts on them for its states, q, k, v and beta,
`decode_experts` for what has been chosen: the kernel just before has made `f` and the gate, or the
hidden features. The decoding in `latent_attention` counts on all but the three before it, which
make q and the new latents, store those and make q_c, for the older latents.

Kernels of other libraries do not begin early, and the first kernel after one of them begins when
it ends.

A multiprocessor splits its memory into L1 and shared memory, and can only split it anew when it has
no program left. So kernels around one with much shared memory should want the same split: see
`prefer_shared`.
"""

import ctypes
import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

from kimi_kernels.dispatch import capability, may_overlap


def overlap(device: torch.device, always: bool = False) -> dict[str, Any]:
    """Options of a launch whose kernel calls `wait_for_inputs`: whether it begins early.

    always: also outside of `overlapping`, after a kernel of the same op.
    """
    able = capability(device) >= (9, 0)
    early = able and (always or may_overlap())
    return {"OVERLAP": able} | ({"launch_pdl": True} if early else {})


CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent


@functools.cache
def prefer_shared(kernel: Any) -> None:
    """A multiprocessor that runs this kernel should have as much shared memory as it can.

    Then a kernel that needs it begins there while this one runs, and not when it has ended. Triton
    has no option for it.

    kernel: what the launch has returned; None in the interpreter.
    """
    if kernel is None:
        return
    target = kernel.metadata.target
    if target.backend != "cuda" or target.arch < 90:  # nothing begins early there
        return
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    error = driver.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), CARVEOUT, 100)
    if error:
        raise RuntimeError(f"CUDA error {error} where {kernel.name} asks for shared memory")


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr, EARLY: tl.constexpr = False):
    """The kernels before have ended, and what they have written is there from here on.

    EARLY: the next kernel may begin now, not after that. It should read many weights ahead, while
    this one and the one before leave the memory idle; of a chain in which all are EARLY the waiting
    programs get in the way of those that work.
    """
    if OVERLAP:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
