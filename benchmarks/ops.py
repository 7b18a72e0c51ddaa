"""What is measured: each op with its shapes, its cost and who computes it. No code but formulas.

FLOPs are those of the algorithm (TR section 6.2, chunks of 64), 2 per multiply-add; bytes are the
fewest that must pass through device memory, each input read and each output written once. The
larger of the two times is the op's `floor`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks import inputs as data
from benchmarks import model_step
from benchmarks import providers as by
from benchmarks.inputs import TOP_K, Inputs, Shape
from benchmarks.providers import Build, Provider, forward, gradient, reference, train

DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize  # bytes


@dataclass(frozen=True)
class Op:
    """One op in one mode.

    Attributes:
        tests: glob of the test files that guard it, from the root of the repository.
        inputs: draws the inputs for a shape, in a dtype, on a device.
        providers: by name; those of one op get the same inputs.
        check: letters that change for the check against the provider `reference`, to make a small
            shape; None: no check.
        timer: `events`: single calls; `graph`: calls in a CUDA graph, on different memory;
            `process`: the first call of a fresh process; `error`: no time, but how far the outputs
            are from those of the provider `reference` in fp64, as RMS(x - gold) / RMS(gold).
        rotate: the inputs of the i-th call in a CUDA graph from those of the first, i = 0: differs
            where their values choose the memory that is read.
    """

    name: str
    mode: str
    tests: str
    shapes: tuple[Shape, ...]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape], float]
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    providers: dict[str, Provider]
    check: Shape | None = None
    timer: Literal["events", "graph", "process", "error"] = "events"
    rotate: Callable[[Inputs, int], Inputs] = lambda x, i: x


# released widths, 3 KDA layers + MLA, one of them with a dense feed-forward; letters: model_step.py
MODEL = {"L": 4, "D": 2304, "H": 32, "K": 128, "E": 256, "F": 1024, "R": 512, "vocab": 163840}


def _kda_shape(B: int, T: int, H: int = 32) -> Shape:
    return {"B": B, "T": T, "H": H, "K": 128, "V": 128}


def _step_shape(B: int) -> Shape:
    return {"B": B, "H": 32, "K": 128, "V": 128, "W": 4}


def _moe_shape(B: int, T: int) -> Shape:
    return {"B": B, "T": T, "D": 2304, "E": 256, "F": 1024}


def _tokens(s: Shape) -> int:
    """Tokens times heads."""
    return s["B"] * s["T"] * s["H"]


def _kda_flops(s: Shape) -> float:
    """Forward."""
    K, V, C = s["K"], s["V"], 64
    return _tokens(s) * (6 * K * V + C * (2 * K + V) + C * C)


def _kda_bytes(s: Shape) -> float:
    """q, k, f, v, b in; o out."""
    return _tokens(s) * SIZE * (3 * s["K"] + 2 * s["V"] + 1)


def _kda_train_bytes(s: Shape) -> float:
    """The forward pass; then the same five and do in, five gradients out."""
    return _kda_bytes(s) + _tokens(s) * SIZE * (6 * s["K"] + 3 * s["V"] + 2)


def _step_flops(s: Shape) -> float:
    B, H, K, V, W = (s[letter] for letter in "BHKVW")
    return B * H * (7 * K * V + 2 * W * (2 * K + V) + 8 * V)


def _step_bytes(s: Shape) -> float:
    """Both states in and out; projections, f, b, gate and weights in; o out."""
    B, H, K, V, W = (s[letter] for letter in "BHKVW")
    D = H * (2 * K + V)
    state = 2 * B * H * K * V * 4
    return state + SIZE * (B * (D + H * K + H + 2 * H * V + 2 * (W - 1) * D) + D * W)


def _conv_bytes(s: Shape) -> float:
    """x and weight in; y out."""
    return SIZE * 3 * s["K"] * (2 * _tokens(s) + s["H"] * s["W"])


def _conv_train_bytes(s: Shape) -> float:
    """The forward pass; then x, weight and dy in, dx and dweight out."""
    return _conv_bytes(s) + SIZE * 3 * s["K"] * (3 * _tokens(s) + 2 * s["H"] * s["W"])


def _norm_bytes(s: Shape) -> float:
    """x, g and w in; o out."""
    return SIZE * s["V"] * (3 * _tokens(s) + 1)


def _norm_train_bytes(s: Shape) -> float:
    """The forward pass; then x, g, w and do in, dx, dg and dw out."""
    return _norm_bytes(s) + SIZE * s["V"] * (5 * _tokens(s) + 2)


def _moe_flops(s: Shape) -> float:
    """Forward: gate, up and down."""
    return 6 * s["B"] * s["T"] * TOP_K * s["D"] * s["F"]


def _moe_bytes(s: Shape) -> float:
    """E (1 - (1 - k / E)^n) experts, the mean that n tokens hit, x, index and weights in; y out."""
    B, T, D, E, F = (s[letter] for letter in "BTDEF")
    hit = E * (1 - (1 - TOP_K / E) ** (B * T))
    return SIZE * (hit * 3 * D * F + 2 * B * T * D) + B * T * TOP_K * (8 + 4)


def _moe_train_bytes(s: Shape) -> float:
    """The forward pass; then the same and do in, gradients of x, weights and E experts out."""
    B, T, D, E, F = (s[letter] for letter in "BTDEF")
    return 2 * _moe_bytes(s) + SIZE * (E * 3 * D * F + B * T * D) + B * T * TOP_K * 4


def _model_flops(s: Shape) -> float:
    """6 per active parameter and token; thrice the forward of KDA's chunks and of causal MLA."""
    B, T, L, H, K = (s[letter] for letter in "BTLHK")
    mla_layers = -(-L // 4)
    kda = (L - mla_layers) * _kda_flops(s | {"V": K})
    mla = mla_layers * B * H * T * T * (2 * K + K // 2)  # half of 2 T^2 per channel of k and v
    return 6 * model_step.parameters(s)["active"] * B * T + 3 * (kda + mla)


def _model_bytes(s: Shape) -> float:
    """Every weight in, every gradient out."""
    return 2 * SIZE * model_step.parameters(s)["total"]


def _small(limit: int) -> Callable[[Shape], bool]:
    """Up to `limit` tokens times heads."""
    return lambda s: _tokens(s) <= limit


def _few(limit: int) -> Callable[[Shape], bool]:
    """Up to `limit` tokens."""
    return lambda s: s["B"] * s["T"] <= limit


def _fla(build: Build, expected: Build | None = None) -> Provider:
    return Provider(build, module="fla", package="fla-core", expected=expected)


def _flash_kda(build: Build, expected: Build | None = None) -> Provider:
    return Provider(build, module="flash_kda", package="flash_kda", expected=expected)


def _transformers(build: Build) -> Provider:
    return Provider(build, module="transformers", package="transformers")


BOUNDED = reference(forward(by.our_bounded_kda))
KDA_TESTS = "tests/kernels/test_kda*.py"
CONV_TESTS = "tests/kernels/test_causal_conv*.py"
MOE_TESTS = "tests/kernels/test_moe*.py"

OPS = (
    Op(
        name="kda",
        mode="forward",
        tests=KDA_TESTS,
        shapes=(
            _kda_shape(1, 2048),
            _kda_shape(1, 8192),
            _kda_shape(1, 65536),
            _kda_shape(8, 2048),
            _kda_shape(1, 1048576, 8),
        ),
        flops=_kda_flops,
        bytes=_kda_bytes,
        inputs=data.kda_inputs,
        check={"B": 1, "T": 256},
        providers={
            "ours": Provider(forward(by.our_kda)),
            "fla": _fla(forward(by.fla_kda)),
            "fla_bounded": _fla(forward(by.fla_bounded_kda), BOUNDED),
            "flash_kda": _flash_kda(forward(by.flash_kda), BOUNDED),
            "reference": Provider(reference(forward(by.our_kda)), fits=_small(2048 * 32)),
        },
    ),
    Op(
        name="kda",
        mode="train",
        tests=KDA_TESTS,
        shapes=(
            _kda_shape(1, 2048),
            _kda_shape(1, 8192),
            _kda_shape(1, 65536),
            _kda_shape(8, 2048),
        ),
        flops=lambda s: 3 * _kda_flops(s),
        bytes=_kda_train_bytes,
        inputs=data.kda_train_inputs,
        check={"B": 1, "T": 256},
        providers={
            "ours": Provider(train(by.our_kda)),
            "fla": _fla(train(by.fla_kda)),
            "reference": Provider(reference(train(by.our_kda)), fits=_small(2048 * 32)),
        },
    ),
    Op(
        name="kda_step",
        mode="decode",
        tests=KDA_TESTS,
        shapes=tuple(_step_shape(B) for B in (1, 32, 128, 256)),
        flops=_step_flops,
        bytes=_step_bytes,
        inputs=data.kda_step_inputs,
        check={"B": 2},
        providers={
            "ours": Provider(by.our_kda_step),
            "fla": _fla(by.fla_kda_step),
            "fla_recurrence": _fla(by.fla_recurrence, reference(by.recurrence)),
            "reference": Provider(reference(by.kda_step_in_parts), fits=lambda s: s["B"] <= 32),
        },
        timer="graph",
    ),
    Op(
        name="conv",
        mode="forward",
        tests=CONV_TESTS,
        shapes=({"B": 1, "T": 8192, "H": 32, "K": 128, "W": 4},),
        flops=lambda s: _tokens(s) * 3 * s["K"] * 2 * s["W"],
        bytes=_conv_bytes,
        inputs=data.conv_inputs,
        check={"T": 256},
        providers={
            "ours": Provider(forward(by.our_conv)),
            "fla": _fla(forward(by.fla_conv)),
            "reference": Provider(reference(forward(by.our_conv))),
        },
    ),
    Op(
        name="conv",
        mode="train",
        tests=CONV_TESTS,
        shapes=({"B": 1, "T": 8192, "H": 32, "K": 128, "W": 4},),
        flops=lambda s: 3 * _tokens(s) * 3 * s["K"] * 2 * s["W"],
        bytes=_conv_train_bytes,
        inputs=data.conv_train_inputs,
        check={"T": 256},
        providers={
            "ours": Provider(train(by.our_conv)),
            "fla": _fla(train(by.fla_conv)),
            "reference": Provider(reference(train(by.our_conv))),
        },
    ),
    Op(
        name="gated_norm",
        mode="forward",
        tests="tests/kernels/test_gated_norm.py",
        shapes=({"B": 1, "T": 8192, "H": 32, "V": 128},),
        flops=lambda s: _tokens(s) * s["V"] * 8,
        bytes=_norm_bytes,
        inputs=data.gated_norm_inputs,
        check={"T": 256},
        providers={
            "ours": Provider(forward(by.our_norm)),
            "fla": _fla(forward(by.fla_norm)),
            "reference": Provider(reference(forward(by.our_norm))),
        },
    ),
    Op(
        name="gated_norm",
        mode="train",
        tests="tests/kernels/test_gated_norm.py",
        shapes=({"B": 1, "T": 8192, "H": 32, "V": 128},),
        flops=lambda s: 3 * _tokens(s) * s["V"] * 8,
        bytes=_norm_train_bytes,
        inputs=data.gated_norm_train_inputs,
        check={"T": 256},
        providers={
            "ours": Provider(train(by.our_norm)),
            "fla": _fla(train(by.fla_norm)),
            "reference": Provider(reference(train(by.our_norm))),
        },
    ),
    *(
        Op(
            name="rms_norm",
            mode=mode,
            tests="tests/kernels/test_rms_norm.py",
            shapes=({"B": 1, "T": 8192, "D": 2304},),
            flops=lambda s, flops=flops: flops * s["B"] * s["T"] * s["D"],
            bytes=lambda s, passes=passes: SIZE * passes * s["B"] * s["T"] * s["D"],
            inputs=inputs,
            check={"T": 256},
            providers={
                "ours": Provider(how(by.our_add_norm)),
                "torch": Provider(how(by.torch_add_norm)),
                "reference": Provider(reference(how(by.our_add_norm))),
            },
        )
        # both in, sum and norm out; then the sum and both gradients in, one gradient out
        for mode, how, flops, passes, inputs in (
            ("forward", forward, 5, 4, data.rms_norm_inputs),
            ("train", train, 15, 8, data.rms_norm_train_inputs),
        )
    ),
    *(
        Op(
            name="moe",
            mode=mode,
            tests=MOE_TESTS,
            shapes=tuple(_moe_shape(1, T) for T in (512, 2048, 8192)),
            flops=lambda s, passes=passes: passes * _moe_flops(s),
            bytes=moved,
            inputs=inputs,
            check={"T": 256, "E": 32},
            providers={
                "ours": Provider(how(by.our_experts)),
                "grouped_mm": _transformers(how(by.grouped_mm)),
                "scattermoe": Provider(
                    how(by.scattermoe), module="scattermoe", package="scattermoe"
                ),
                # its backward pass writes the gradients of all experts once per expert
                "reference": Provider(reference(how(by.our_experts)), fits=_few(256)),
            },
        )
        for mode, how, passes, moved, inputs in (
            ("forward", forward, 1, _moe_bytes, data.moe_inputs),
            ("train", train, 3, _moe_train_bytes, data.moe_train_inputs),
        )
    ),
    Op(
        name="moe",
        mode="decode",
        tests=MOE_TESTS,
        shapes=tuple(_moe_shape(B, 1) for B in (1, 8, 32)),
        flops=_moe_flops,
        bytes=_moe_bytes,
        inputs=data.moe_inputs,
        check={"E": 32},
        providers={
            "ours": Provider(forward(by.our_experts)),
            "grouped_mm": _transformers(forward(by.grouped_mm)),
            "batched_mm": replace(_transformers(forward(by.batched_mm)), fits=_few(32)),
            # for the check alone: the host waits for it, so it cannot be in a CUDA graph
            "reference": Provider(reference(forward(by.our_experts)), fits=_few(0)),
        },
        timer="graph",
        rotate=data.other_tokens,
    ),
    Op(
        name="model",
        mode="train_step",
        # the tests that need no native model: beside fla that one does not run on a CPU
        tests="tests/model/test_packing.py",
        shapes=({"B": 1, "T": 4096} | MODEL,),
        flops=_model_flops,
        bytes=_model_bytes,
        inputs=model_step.inputs,
        # 8 of 8 experts: where some are left out, one bf16 rounding chooses others
        check={"B": 1, "T": 256, "E": 8, "vocab": 1024},
        providers={
            "ours": Provider(model_step.ours),
            "native": _fla(model_step.native),
            "reference": Provider(
                reference(model_step.ours), fits=lambda s: s["B"] * s["T"] <= 2048
            ),
        },
    ),
    Op(
        name="kda",
        mode="cold",
        tests=KDA_TESTS,
        shapes=(_kda_shape(1, 8192),),
        flops=_kda_flops,
        bytes=_kda_bytes,
        inputs=data.kda_inputs,
        providers={
            "ours": Provider(forward(by.our_kda)),
            "fla": _fla(forward(by.fla_kda)),
        },
        timer="process",
    ),
    Op(
        name="kda",
        mode="cold_train",
        tests=KDA_TESTS,
        shapes=(_kda_shape(1, 8192),),
        flops=lambda s: 3 * _kda_flops(s),
        bytes=_kda_train_bytes,
        inputs=data.kda_train_inputs,
        providers={
            "ours": Provider(train(by.our_kda)),
            "fla": _fla(train(by.fla_kda)),
        },
        timer="process",
    ),
    *(
        Op(
            name="kda_gradients",
            mode=mode,
            tests=KDA_TESTS,
            shapes=(_kda_shape(1, 2048),),
            flops=lambda s: 3 * _kda_flops(s),
            bytes=_kda_train_bytes,
            inputs=inputs,
            providers={
                "ours": Provider(gradient("A_log", train(by.our_kda))),
                "fla": _fla(gradient("A_log", train(by.fla_kda))),
                "reference": Provider(reference(gradient("A_log", train(by.our_kda)))),
            },
            timer="error",
        )
        for mode, inputs in (
            ("error", data.kda_train_inputs),
            ("error_strong", data.strong_gate_inputs),
        )
    ),
)
