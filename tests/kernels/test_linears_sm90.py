"""The machine code of fused_linears for Hopper, without a GPU. As a script it compiles."""

import sys
from pathlib import Path

import torch

from tests.kernels.sm90 import compile_in_child, record, write

CASES = {  # rows, inputs, outputs, whether there is a norm, whether there is a residual
    "projections of KDA": (1, 2304, (4096, 4096, 4096, 128, 128, 32), True, False),
    "low ranks of KDA": (1, 128, (4096, 4096), False, False),
    "output projection": (1, 4096, (2304,), False, True),
    "router": (1, 2304, (256,), True, False),
    "two tokens": (2, 2304, (6144, 576), True, False),
    "two tokens, output projection": (2, 4096, (2304,), False, True),
    "eight tokens": (8, 2304, (4096, 4096, 4096, 128, 128, 32), False, False),
    "eight tokens, projections of MLA": (8, 2304, (6144, 576), False, False),
    "48 tokens": (48, 2304, (4096, 4096, 4096, 128, 128, 32), False, False),
    "128 tokens": (128, 2304, (9216, 9216), False, False),
}


def test_machine_code(tmp_path):
    """Each begins early (ACQBULK waits for what is before it, PREEXIT lets the next one begin).

    From three tokens on they are on tensor cores and read ahead into shared memory (LDGSTS).
    """
    kernels = compile_in_child(__name__, tmp_path)
    assert [x.case for x in kernels] == list(CASES)
    for x in kernels:
        assert x.stack == 0 and x.words["ACQBULK"] and x.words["PREEXIT"], str(x)
        assert not x.early, str(x)
        tiled = CASES[x.case][0] > 2
        products = x.words["HMMA"] + x.words["HGMMA"]
        assert (products > 0) == (x.words["LDGSTS"] > 0) == tiled and not x.broken, str(x)


def compile_cases(folder: Path) -> None:
    compiled, kernels = record(), []
    from kimi_kernels.dispatch import overlapping
    from kimi_kernels.linears_triton import fused_linears_fwd

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for case, (rows, K, sizes, normed, added) in CASES.items():
        norm = (empty(K), 1e-5) if normed else None
        residual = empty(rows, sizes[0]) if added else None
        weights = [empty(n, K) for n in sizes]
        with overlapping():
            fused_linears_fwd(
                [empty(rows, K)] * len(sizes), weights, torch.bfloat16, norm, residual
            )
        kernels.append((case, compiled.pop()))
    write(kernels, folder)


if __name__ == "__main__":
    compile_cases(Path(sys.argv[1]))
