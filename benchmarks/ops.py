"""What is measured: each op with its shapes, its cost and who computes it.

The larger of the times that its FLOPs and its bytes take (costs.py) is the op's `floor`. Whole
models are in model_ops.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks import costs
from benchmarks import inputs as data
from benchmarks import providers as by
from benchmarks.costs import SIZE
from benchmarks.inputs import Shape
from benchmarks.model_ops import FP8_TESTS, LONG, MODEL_OPS
from benchmarks.op import Op, few, fla, with_or_without_flash
from benchmarks.providers import Build, Provider, forward, gradient, reference, train


def _kda_shape(B: int, T: int, H: int = 32) -> Shape:
    return {"B": B, "T": T, "H": H, "K": 128, "V": 128}


def _step_shape(B: int) -> Shape:
    return {"B": B, "H": 32, "K": 128, "V": 128, "W": 4}


def _moe_shape(B: int, T: int) -> Shape:
    return {"B": B, "T": T, "D": 2304, "E": 256, "F": 1024}


def _small(limit: int) -> Callable[[Shape], bool]:
    """Up to `limit` tokens times heads."""
    return lambda s: costs.tokens(s) <= limit


def _flash_kda(build: Build, expected: Build | None = None) -> Provider:
    return Provider(build, module="flash_kda", package="flash_kda", expected=expected)


def _transformers(build: Build) -> Provider:
    return Provider(build, module="transformers", package="transformers")


BOUNDED = reference(forward(by.our_bounded_kda))
KDA_TESTS = "tests/kernels/test_kda*.py"
CONV_TESTS = "tests/kernels/test_causal_conv*.py"
MOE_TESTS = "tests/kernels/test_moe*.py"
# how attention within a prompt runs, its passes, and what it moves and gets
PROMPT = forward, 1, costs.prompt_bytes, data.prompt_inputs
PROMPT_TRAIN = train, 3, costs.prompt_train_bytes, data.prompt_train_inputs

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
            "fla": fla(forward(by.fla_kda)),
            "fla_bounded": fla(forward(by.fla_bounded_kda), BOUNDED),
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
            "fla": fla(train(by.fla_kda)),
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
            "fla": fla(by.fla_kda_step),
            "fla_recurrence": fla(by.fla_recurrence, reference(by.recurrence)),
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
            "fla": fla(forward(by.fla_conv)),
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
            "fla": fla(train(by.fla_conv)),
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
            "fla": fla(forward(by.fla_norm)),
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
            "fla": fla(train(by.fla_norm)),
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
                "reference": Provider(reference(how(by.our_experts)), fits=few(256)),
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
            "batched_mm": replace(_transformers(forward(by.batched_mm)), fits=few(32)),
            # for the check alone: the host waits for it, so it cannot be in a CUDA graph
            "reference": Provider(reference(forward(by.our_experts)), fits=few(0)),
        },
        timer="graph",
        rotate=data.other_tokens,
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
            "fla": fla(forward(by.fla_kda)),
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
            "fla": fla(train(by.fla_kda)),
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
                "fla": fla(gradient("A_log", train(by.fla_kda))),
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
            name="mla",
            mode=mode,
            tests="tests/kernels/test_attention*.py",
            shapes=tuple({"T": T, "H": 32, "K": 128, "R": 512} for T in lengths),
            flops=lambda s, passes=passes, n=n: passes * costs.prompt_flops(s, n),
            bytes=moved,
            inputs=inputs,
            check={"T": 256},
            providers={
                **with_or_without_flash(how(partial(by.our_prompt, n > 1))),
                "sdpa": Provider(how(partial(by.sdpa_prompt, n > 1))),
                "reference": Provider(
                    reference(how(partial(by.our_prompt, n > 1))), fits=lambda s: s["T"] <= 256
                ),
            },
        )
        for mode, n, lengths, (how, passes, moved, inputs) in (
            ("forward", 1, (8192, 32768), PROMPT),
            ("train", 1, (8192,), PROMPT_TRAIN),
            ("packed", data.DOCUMENTS, (8192,), PROMPT),
            ("packed_train", data.DOCUMENTS, (8192,), PROMPT_TRAIN),
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
    *MODEL_OPS,
)
