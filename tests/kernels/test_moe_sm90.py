"""The machine code of the mixture of experts at the released widths for Hopper, without a GPU.

As test_sm90_code.py does for KDA. As a script it is the compiling process.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.sm90 import SHARED, compile_in_child, record, write

T, E, D, F, TOP_K = 8192, 256, 2304, 1024, 8
STACK = 24  # bytes: what decode_hidden_kernel has in fp16; of the products one has 8, the others 0
PRODUCTS = {  # case: kernel
    "dgate_up, Gluon": "weights_gluon_kernel",
    "ddown, Gluon": "weights_gluon_kernel",
    "dgate_up": "weights_kernel",
    "ddown": "weights_kernel",
    "down": "rows_kernel",
    "dx": "rows_kernel",
    "gate_up": "gate_up_kernel",
}
VECTORS = [
    ("decoding", "decode_hidden_kernel"),
    ("decoding", "decode_sum_kernel"),
    ("dense", "decode_hidden_kernel"),
    ("dense", "decode_sum_kernel"),
    *((f"router, rows {rows}", "fused_linears_kernel") for rows in (1, 2)),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_machine_code(dtype, tmp_path):
    kernels = compile_in_child(__name__, tmp_path, dtype)
    assert [(x.case, x.name) for x in kernels] == [*PRODUCTS.items(), *VECTORS]
    for x in kernels:
        assert not x.broken and x.shared <= SHARED and x.stack <= STACK, str(x)
        assert (x.words["HGMMA"] > 0) == (x.case in PRODUCTS) and not x.words["HMMA"], str(x)


def compile_cases(dtype: str, folder: Path) -> None:
    """Kernels of a training step, then of decoding."""
    compiled, kernels = record(), []
    from kimi_kernels.linears_triton import fused_linears_fwd
    from kimi_kernels.moe import weights_gluon
    from kimi_kernels.moe.decode_triton import decode_experts
    from kimi_kernels.moe.experts_triton import hidden_rows
    from kimi_kernels.moe.grouped_gemm import row_tile, rows_product, weights_product
    from kimi_kernels.moe.plan_triton import Plan, max_tiles

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def ints(*shape):
        return tensor(*shape, dtype="int32")

    def launch(case, function, *args, **options):
        compiled.clear()
        function(*args, **options)
        kernels.extend((case, x) for x in compiled)

    S, x, gate_up, down = T * TOP_K, tensor(T, D), tensor(E, 2 * F, D), tensor(E, D, F)
    h, gu, tile = tensor(S, F), tensor(S, 2 * F), row_tile(S, E, x.dtype, x.device)
    plan = Plan(ints(S), ints(S), ints(E + 1), ints(3, max_tiles(S, E, tile.BM)))
    for form in (", Gluon", ""):
        launch("dgate_up" + form, weights_product, gu, x, E, plan, gather_b=TOP_K)
        launch("ddown" + form, weights_product, x, h, E, plan, gather_a=TOP_K)
        weights_gluon.takes = lambda a, b: False
    launch("down", rows_product, h, down, plan, tile)
    launch("dx", rows_product, gu, gate_up, plan, tile, trans=True)
    launch("gate_up", hidden_rows, x, gate_up, plan, tile, TOP_K, True)
    index, weights = tensor(1, TOP_K, dtype="int64"), tensor(1, TOP_K, dtype="float32")
    shared = tensor(F, D), tensor(F, D), tensor(D, F)
    launch("decoding", decode_experts, tensor(1, D), gate_up, down, index, weights, shared)
    F_d = 9 * F
    none = tensor(0, 2 * F_d, D), tensor(0, D, F_d), tensor(1, 0, dtype="int64"), tensor(1, 0)
    shared = tensor(F_d, D), tensor(F_d, D), tensor(D, F_d)
    launch("dense", decode_experts, tensor(1, D), *none, shared, (tensor(D), 1e-5))
    for rows in (1, 2):
        xs, ws = [tensor(rows, D)], [tensor(E, D)]
        launch(f"router, rows {rows}", fused_linears_fwd, xs, ws, torch.float32)
    write(kernels, folder)


if __name__ == "__main__":
    compile_cases(sys.argv[1], Path(sys.argv[2]))
