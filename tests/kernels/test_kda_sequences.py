"""KDA over time: causality, continuing from a saved state, packed sequences, determinism."""

import functools
import itertools

import pytest
import torch

from kimi_kernels import chunk_kda, recurrent_kda
from tests.helpers import assert_as_good_as
from tests.kernels.kda_cases import (
    OPS,
    PARAMETERS,
    cumulative,
    gradients,
    make_gate,
    make_inputs,
    make_state,
    tokens,
)

LENGTHS = [[0, 5, 0, 64, 1, 130, 0], [17], [1] * 9, [63, 65], [0, 0, 2]]
each_op = pytest.mark.parametrize("op, make", OPS)


def separately(op, inputs, lengths, states):
    """o and S of every sequence run on its own, laid out as the packed run returns them."""
    ends = cumulative(lengths).tolist()
    outs = [
        op(**tokens(inputs, a, b), initial_state=states[n : n + 1], output_final_state=True)
        for n, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    return torch.cat([o for o, _ in outs], 1), torch.cat([S for _, S in outs])


def assert_equal_runs(got, want):
    for name, a, b in zip("oS", got, want, strict=True):
        assert_as_good_as(name, a, b, b)


# ---- causality and determinism -----------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("t", [0, 14, 15, 31, 62, 63, 64, 100, 127])
def test_later_tokens_change_no_bit(op, make, t, dtype):
    T = 129
    inputs = make(T, HV=1, dtype=dtype)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in set(inputs) - set(PARAMETERS):
        noise = torch.randn_like(inputs[name][:, t + 1 :])
        changed[name][:, t + 1 :] = 10 * noise if name in "qkvfb" else -3000 * noise.abs()
    o, S = op(**inputs, output_final_state=True)
    o2, S2 = op(**changed, output_final_state=True)
    assert torch.equal(o[:, : t + 1], o2[:, : t + 1])
    assert not torch.equal(o[:, t + 1 :], o2[:, t + 1 :]) and not torch.equal(S, S2)


@each_op
@pytest.mark.parametrize("t", [0, 15, 63, 64, 100])
def test_gradients_are_causal(op, make, t):
    """An output gradient at t reaches no input after t, to the bit."""
    inputs = make(129) | {"initial_state": make_state(1, 2, 6, 5)}
    do = torch.zeros(1, 129, 2, 5).double()
    do[:, t] = torch.randn(2, 5).double()
    grads = gradients(op, inputs, do, torch.zeros(1, 2, 6, 5))
    for name in set(inputs) - {*PARAMETERS, "initial_state"}:
        d = grads[f"d{name}"]
        assert not d[:, t + 1 :].any(), name
        assert d[:, t].any(), name


@each_op
@pytest.mark.parametrize("lengths", [None, [0, 70, 1, 29]])
def test_two_runs_are_bit_equal(op, make, lengths):
    inputs = make(100, dtype=torch.float32)
    N = 1 if lengths is None else len(lengths)
    inputs["initial_state"] = make_state(N, 2, 6, 5, dtype=torch.float32)
    do, dS = torch.randn(1, 100, 2, 5), torch.randn(N, 2, 6, 5)
    cu = None if lengths is None else cumulative(lengths)
    first, second = (gradients(op, inputs, do, dS, cu_seqlens=cu) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- a saved state -----------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("gate", ["ordinary", "mixed"])
@pytest.mark.parametrize("cuts", [[1], [16], [63, 64, 65], [64, 128], [10, 10, 80], list(range(9))])
def test_in_pieces_is_at_once(op, make, cuts, gate):
    T = 140
    inputs = make(T)
    if "g" in inputs:
        inputs["g"] = make_gate(gate, *inputs["g"].shape)
    S = make_state(1, 2, 6, 5)
    want = op(**inputs, initial_state=S, output_final_state=True)
    pieces = []
    for a, b in itertools.pairwise([0, *cuts, T]):
        o, S = op(**tokens(inputs, a, b), initial_state=S, output_final_state=True)
        pieces.append(o)
    assert_equal_runs((torch.cat(pieces, 1), S), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_prefill_then_decode(dtype):
    """chunk for the prompt, recurrent token by token from its state: the same as either alone."""
    inputs = make_inputs(90, dtype=dtype)
    o, S = chunk_kda(**tokens(inputs, 0, 70), output_final_state=True)
    outs = [o]
    for t in range(70, 90):
        o, S = recurrent_kda(**tokens(inputs, t, t + 1), initial_state=S, output_final_state=True)
        outs.append(o)
    gold = recurrent_kda(**{n: x.double() for n, x in inputs.items()}, output_final_state=True)
    got = (torch.cat(outs, 1), S)
    for op in (chunk_kda, recurrent_kda):
        ref = op(**inputs, output_final_state=True)
        for name, a, b, c in zip("oS", got, ref, gold, strict=True):
            assert_as_good_as(name, a, b, c)


@each_op
def test_gradients_flow_through_the_pieces(op, make):
    """Backward through a saved state is backward through the whole."""
    inputs, do, dS = make(80), torch.randn(1, 80, 2, 5), torch.randn(1, 2, 6, 5)
    inputs["initial_state"] = make_state(1, 2, 6, 5)

    def in_pieces(*, initial_state, output_final_state, **rest):
        outs, S = [], initial_state
        for a, b in ((0, 20), (20, 64), (64, 80)):
            o, S = op(**tokens(rest, a, b), initial_state=S, output_final_state=output_final_state)
            outs.append(o)
        return torch.cat(outs, 1), S

    got, want = (gradients(f, inputs, do, dS) for f in (in_pieces, op))
    for name in want:
        assert_as_good_as(name, got[name], want[name], want[name])


# ---- packed sequences --------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_is_separate(op, make, lengths, cu_dtype):
    inputs, states = make(sum(lengths)), make_state(len(lengths), 2, 6, 5)
    got = op(
        **inputs,
        initial_state=states,
        output_final_state=True,
        cu_seqlens=cumulative(lengths, cu_dtype),
    )
    assert_equal_runs(got, separately(op, inputs, lengths, states))
    without_state = op(**inputs, output_final_state=True, cu_seqlens=cumulative(lengths, cu_dtype))
    assert_equal_runs(without_state, separately(op, inputs, lengths, torch.zeros_like(states)))


@each_op
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]], ids=str)
def test_only_empty_sequences_hand_their_states_on(op, make, lengths):
    states = make_state(len(lengths), 2, 6, 5)
    o, S = op(
        **make(0), initial_state=states, output_final_state=True, cu_seqlens=cumulative(lengths)
    )
    assert o.shape == (1, 0, 2, 5)
    assert torch.equal(S, states)


@each_op
def test_one_packed_sequence_is_the_plain_call(op, make):
    inputs = make(70)
    got = op(**inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 70]))
    assert_equal_runs(got, op(**inputs, output_final_state=True))


@each_op
def test_batch_rows_are_packed_sequences(op, make):
    inputs = make(140)
    rows = {n: x if n in PARAMETERS else x.view(2, 70, *x.shape[2:]) for n, x in inputs.items()}
    o, S = op(**rows, output_final_state=True)
    got = op(**inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 70, 140]))
    assert_equal_runs(got, (o.reshape(1, 140, 2, 5), S))


@each_op
@pytest.mark.parametrize("lengths", [[0, 5, 66, 0, 9], [64, 64], [70]], ids=str)
def test_packed_gradients_are_separate(op, make, lengths):
    T, N = sum(lengths), len(lengths)
    inputs, do, dS = make(T), torch.randn(1, T, 2, 5), torch.randn(N, 2, 6, 5)
    inputs["initial_state"] = make_state(N, 2, 6, 5)

    def one_by_one(*, initial_state, output_final_state, **rest):
        return separately(op, rest, lengths, initial_state)

    packed = functools.partial(op, cu_seqlens=cumulative(lengths))
    got, want = (gradients(f, inputs, do, dS) for f in (packed, one_by_one))
    for name in want:
        assert_as_good_as(name, got[name], want[name], want[name])


@each_op
def test_a_packed_document_does_not_see_its_neighbours(op, make):
    """Neither its output, its state nor its gradients, to the bit, whatever the others hold."""
    lengths, own = [10, 70, 20], slice(10, 80)
    inputs, do, dS = make(100), torch.randn(1, 100, 2, 5), torch.randn(3, 2, 6, 5)
    inputs["initial_state"] = make_state(3, 2, 6, 5)
    changed = {name: x.clone() for name, x in inputs.items()}
    do2, dS2 = do.clone(), dS.clone()
    for name, x in [*changed.items(), ("do", do2), ("dS", dS2)]:
        if name in PARAMETERS:
            continue
        mine = slice(1, 2) if name in ("initial_state", "dS") else (slice(None), own)
        kept = x[mine].clone()
        x.copy_(-3000 * x.abs() if name == "g" else x.flip(-1) + 1)
        x[mine] = kept
    packed = functools.partial(op, cu_seqlens=cumulative(lengths))
    a, b = gradients(packed, inputs, do, dS), gradients(packed, changed, do2, dS2)
    for name in set(a) - {f"d{n}" for n in PARAMETERS}:
        mine = slice(1, 2) if name in ("S", "dinitial_state") else (slice(None), own)
        assert torch.equal(a[name][mine], b[name][mine]), name
        assert not torch.equal(a[name], b[name]), name
