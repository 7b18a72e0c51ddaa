"""What is measured: each op with its shapes, its cost and who computes it.

The larger of the times that its FLOPs and its bytes take (costs.py) is the op's `floor`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from benchmarks import costs, model_decode, model_step, trainer_step
from benchmarks import inputs as data
from benchmarks import providers as by
from benchmarks.costs import SIZE
from benchmarks.inputs import Inputs, Shape
from benchmarks.providers import Build, Provider, forward, gradient, reference, train

FLOOR = "floor"  # a provider of every op: nobody computes it
# whose work it bounds: where another does other work, that has a floor of its own
FLOORS = {FLOOR: "ours", "floor_all_mla": "all_mla", "floor_fp8": "fp8"}


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
            are from those of the provider `reference` in fp64, as RMS(x - gold) / RMS(gold);
            `largest`: single calls of each provider alone, at the largest batch that it fits: its
            shapes leave B open.
        rotate: the inputs of the i-th call in a CUDA graph from those of the first, i = 0: differs
            where their values choose the memory that is read.
        memory: bytes that its inputs take, where that decides what a device can run.
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
    timer: Literal["events", "graph", "process", "error", "largest"] = "events"
    rotate: Callable[[Inputs, int], Inputs] = lambda x, i: x
    memory: Callable[[Shape], float] | None = None


# released widths, 3 KDA layers + MLA, one of them with a dense feed-forward; letters: model_step.py
MODEL = {"L": 4, "D": 2304, "H": 32, "K": 128, "E": 256, "F": 1024, "R": 512, "vocab": 163840}
# 8 of 8 experts: where some are left out, one bf16 rounding chooses others
SMALL_MODEL = {"B": 1, "L": 4, "E": 8, "vocab": 1024}


def _kda_shape(B: int, T: int, H: int = 32) -> Shape:
    return {"B": B, "T": T, "H": H, "K": 128, "V": 128}


def _step_shape(B: int) -> Shape:
    return {"B": B, "H": 32, "K": 128, "V": 128, "W": 4}


def _moe_shape(B: int, T: int) -> Shape:
    return {"B": B, "T": T, "D": 2304, "E": 256, "F": 1024}


def _deep_shape(L: int = 8, **sizes: int) -> Shape:
    return sizes | MODEL | {"L": L}


def _small(limit: int) -> Callable[[Shape], bool]:
    """Up to `limit` tokens times heads."""
    return lambda s: costs.tokens(s) <= limit


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
MODEL_TESTS = "tests/model/test_gpu.py"
FP8_TESTS = "tests/kernels/test_mla_fp8.py"
LONG = (4096, 32768, 131072)  # tokens before those whose error is measured
DECODING = {
    "ours": Provider(model_decode.our_step, cache=costs.sequence_bytes),
    "all_mla": Provider(
        model_decode.all_mla_step,
        expected=reference(model_decode.all_mla_step),
        flops=partial(costs.decode_step_flops, all_mla=True),
        bytes=partial(costs.decode_step_bytes, all_mla=True),
        cache=partial(costs.sequence_bytes, all_mla=True),
    ),
    "fp8": Provider(
        model_decode.fp8_step,
        expected=reference(model_decode.fp8_step),
        bytes=partial(costs.decode_step_bytes, fp8=True),
        cache=partial(costs.sequence_bytes, fp8=True),
    ),
    # for the check alone: a CUDA graph cannot hold its second call
    "reference": Provider(reference(model_decode.our_step), fits=lambda s: False),
}

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
        flops=costs.kda_flops,
        bytes=costs.kda_bytes,
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
        flops=lambda s: 3 * costs.kda_flops(s),
        bytes=costs.kda_train_bytes,
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
        flops=costs.step_flops,
        bytes=costs.step_bytes,
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
        flops=lambda s: costs.tokens(s) * 3 * s["K"] * 2 * s["W"],
        bytes=costs.conv_bytes,
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
        flops=lambda s: 3 * costs.tokens(s) * 3 * s["K"] * 2 * s["W"],
        bytes=costs.conv_train_bytes,
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
        flops=lambda s: costs.tokens(s) * s["V"] * 8,
        bytes=costs.norm_bytes,
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
        flops=lambda s: 3 * costs.tokens(s) * s["V"] * 8,
        bytes=costs.norm_train_bytes,
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
            flops=lambda s, passes=passes: passes * costs.moe_flops(s),
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
            ("forward", forward, 1, costs.moe_bytes, data.moe_inputs),
            ("train", train, 3, costs.moe_train_bytes, data.moe_train_inputs),
        )
    ),
    Op(
        name="moe",
        mode="decode",
        tests=MOE_TESTS,
        shapes=tuple(_moe_shape(B, 1) for B in (1, 8, 32)),
        flops=costs.moe_flops,
        bytes=costs.moe_bytes,
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
        flops=costs.train_step_flops,
        bytes=costs.train_step_bytes,
        inputs=model_step.inputs,
        check=SMALL_MODEL | {"T": 256},
        providers={
            "ours": Provider(model_step.ours),
            "native": _fla(model_step.native),
            "reference": Provider(reference(model_step.ours), fits=_few(2048)),
        },
    ),
    Op(
        name="trainer",
        mode="optimizer_step",
        tests="tests/model/test_loss.py",
        shapes=({"B": 1, "T": 8192} | MODEL,),
        flops=costs.trainer_step_flops,
        bytes=costs.trainer_step_bytes,
        inputs=model_step.inputs,
        check=SMALL_MODEL | {"T": 512},
        providers={
            "ours": Provider(trainer_step.trainer),
            "autocast": Provider(trainer_step.autocast_trainer),
            "bare": Provider(trainer_step.bare),
            # for the check alone
            "reference": Provider(reference(trainer_step.bare), fits=_few(0)),
        },
    ),
    Op(
        name="model",
        mode="prefill",
        tests=MODEL_TESTS,
        # longer ones on request (--shape T=1048576): every layer MLA takes minutes
        shapes=(
            *(_deep_shape(B=1, T=T) for T in (4096, 8192, 32768, 131072)),
            _deep_shape(B=1, T=8192, L=27),
        ),
        flops=costs.prefill_flops,
        bytes=costs.prefill_bytes,
        inputs=model_step.inputs,
        check=SMALL_MODEL | {"T": 256},
        providers={
            "ours": Provider(model_decode.our_prefill),
            "native": replace(_fla(model_decode.native_prefill), fits=_few(32768)),
            "all_mla": Provider(
                model_decode.all_mla_prefill,
                expected=reference(model_decode.all_mla_prefill),
                flops=partial(costs.prefill_flops, all_mla=True),
                bytes=partial(costs.prefill_bytes, all_mla=True),
            ),
            "reference": Provider(reference(model_decode.our_prefill), fits=_few(2048)),
        },
        memory=costs.weight_bytes,
    ),
    Op(
        name="model",
        mode="decode_step",
        tests=MODEL_TESTS,
        shapes=tuple(
            _deep_shape(B=B, S=S, L=L)
            for B, S, L in (
                *((1, S, 8) for S in (1024, 4096, 32768, 131072, 1048576)),
                *((32, 1024, 8), (8, 131072, 8)),
                *((1, S, 27) for S in (1024, 131072, 1048576)),
            )
        ),
        flops=costs.decode_step_flops,
        bytes=costs.decode_step_bytes,
        inputs=model_decode.decode_inputs,
        check=SMALL_MODEL | {"B": 2, "S": 256},
        providers={
            **DECODING,
            # it expands the keys and values of the whole context for each token
            "native": replace(
                _fla(model_decode.native_step), fits=lambda s: s["B"] * s["S"] <= 32768
            ),
        },
        memory=costs.weight_bytes,
    ),
    Op(
        name="model",
        mode="throughput",
        tests=MODEL_TESTS,
        shapes=tuple(_deep_shape(S=S) for S in (4096, 32768, 131072, 524288, 1048576)),
        flops=costs.decode_step_flops,
        bytes=costs.decode_step_bytes,
        inputs=model_decode.decode_inputs,
        check=SMALL_MODEL | {"B": 2, "S": 256},
        providers=DECODING,
        timer="largest",
        memory=costs.weight_bytes,
    ),
    Op(
        name="model",
        mode="generate",
        tests=MODEL_TESTS,
        shapes=tuple(_deep_shape(B=1, S=1024, N=64, L=L) for L in (8, 27)),
        flops=costs.generate_flops,
        bytes=costs.generate_bytes,
        inputs=model_decode.generate_inputs,
        # one token: which ones follow hangs on rounding
        check=SMALL_MODEL | {"S": 256, "N": 1},
        providers={
            "ours": Provider(model_decode.our_generate),
            "native": _fla(model_decode.native_generate),
            "reference": Provider(
                reference(model_decode.our_generate), fits=lambda s: s["B"] * s["S"] <= 256
            ),
        },
        memory=costs.weight_bytes,
    ),
    Op(
        name="kda",
        mode="cold",
        tests=KDA_TESTS,
        shapes=(_kda_shape(1, 8192),),
        flops=costs.kda_flops,
        bytes=costs.kda_bytes,
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
        flops=lambda s: 3 * costs.kda_flops(s),
        bytes=costs.kda_train_bytes,
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
            flops=lambda s: 3 * costs.kda_flops(s),
            bytes=costs.kda_train_bytes,
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
    *(
        Op(
            name="mla_fp8",
            mode=mode,
            tests=FP8_TESTS,
            shapes=tuple({"B": 1, "T": 1, "S": S, "H": 32, "K": 128, "R": 512} for S in LONG),
            flops=costs.latent_flops,
            bytes=costs.latent_bytes,
            inputs=inputs,
            providers={
                "ours": Provider(forward(by.our_latent_attention)),
                "fp8": Provider(forward(by.fp8_latent_attention)),
                "reference": Provider(reference(forward(by.our_latent_attention))),
            },
            timer="error",
        )
        for mode, inputs in (
            ("even", data.latent_inputs),
            ("outliers", data.outlier_latent_inputs),
        )
    ),
    Op(
        name="model_fp8",
        mode="logits",
        tests=FP8_TESTS,
        # few experts, so that fp64 fits; no choice of them, which one rounding would change
        shapes=tuple({"B": 1, "S": S} | MODEL | {"E": 8} for S in LONG),
        flops=costs.decode_step_flops,
        bytes=costs.decode_step_bytes,
        inputs=model_decode.decode_inputs,
        providers={
            "ours": Provider(model_decode.our_step),
            "fp8": Provider(model_decode.fp8_step),
            "reference": Provider(reference(model_decode.our_step)),
        },
        timer="error",
    ),
)
