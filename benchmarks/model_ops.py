"""What is measured of whole models; as ops.py."""

from dataclasses import replace
from functools import partial

from benchmarks import costs, model_decode, model_step, trainer_step
from benchmarks.inputs import Shape
from benchmarks.op import Op, few, fla, with_or_without_flash
from benchmarks.providers import Provider, flash_attn, reference

# released widths, 3 KDA layers + MLA, one of them with a dense feed-forward; letters: model_step.py
MODEL = {"L": 4, "D": 2304, "H": 32, "K": 128, "E": 256, "F": 1024, "R": 512, "vocab": 163840}
# 8 of 8 experts: where some are left out, one bf16 rounding chooses others
SMALL_MODEL = {"B": 1, "L": 4, "E": 8, "vocab": 1024}


def _deep_shape(L: int = 8, **sizes: int) -> Shape:
    return sizes | MODEL | {"L": L}


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

MODEL_OPS = (
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
            "native": fla(model_step.native),
            "reference": Provider(reference(model_step.ours), fits=few(2048)),
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
            "reference": Provider(reference(trainer_step.bare), fits=few(0)),
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
            **with_or_without_flash(model_decode.our_prefill),
            "native": replace(fla(model_decode.native_prefill), fits=few(32768)),
            "all_mla": Provider(
                flash_attn(model_decode.all_mla_prefill, wanted=False),
                expected=reference(model_decode.all_mla_prefill),
                flops=partial(costs.prefill_flops, all_mla=True),
                bytes=partial(costs.prefill_bytes, all_mla=True),
            ),
            "reference": Provider(reference(model_decode.our_prefill), fits=few(2048)),
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
                fla(model_decode.native_step), fits=lambda s: s["B"] * s["S"] <= 32768
            ),
        },
        memory=costs.weight_bytes,
    ),
    Op(
        name="model",
        mode="throughput",
        tests=MODEL_TESTS,
        shapes=(
            *(_deep_shape(S=S) for S in (4096, 32768, 131072, 524288, 1048576)),
            _deep_shape(S=1048576) | {"E": 128},
        ),
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
        # of 64 and 256 tokens: what is left of their difference is the time of a token
        shapes=tuple(_deep_shape(B=1, S=1024, N=N, L=L) for L in (8, 27) for N in (64, 256)),
        flops=costs.generate_flops,
        bytes=costs.generate_bytes,
        inputs=model_decode.generate_inputs,
        # one token: which ones follow hangs on rounding
        check=SMALL_MODEL | {"S": 256, "N": 1},
        providers={
            "ours": Provider(model_decode.our_generate),
            "native": fla(model_decode.native_generate),
            "reference": Provider(
                reference(model_decode.our_generate), fits=lambda s: s["B"] * s["S"] <= 256
            ),
        },
        memory=costs.weight_bytes,
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
