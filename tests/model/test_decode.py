"""Decoding with fixed addresses on a CPU: a stand-in for a CUDA graph calls what it would hold.

On a GPU, with real graphs: test_gpu.py.
"""

import warnings

import pytest
import torch
from torch import Tensor

from kimi_linear import KimiLinearCache, decode
from kimi_linear import modeling_kimi_linear as modeling
from kimi_linear.decode import DecodeGraphs, decode_graphs, why_not_captured
from kimi_linear.layout import DECODE_TOKENS
from tests.helpers import assert_as_good_as
from tests.model.helpers import build, random_ids, small_config

CONFIG = small_config()
KINDS = "linear", "full"


@pytest.fixture
def model(monkeypatch):
    """In fp64; the reference attends to whole buffers, as the kernels do."""
    monkeypatch.setattr(modeling, "use_triton", lambda x: True)
    return build(CONFIG).double()


class StandIn:
    """Runs the Python code again, on the tensors that it had when it was captured."""

    def __init__(self, run, logits):
        self.run, self.logits = run, logits

    def replay(self):
        self.logits.copy_(self.run())


@pytest.fixture
def captures(monkeypatch):
    """How often each shape was captured."""
    counts: dict[tuple[int, int], int] = {}

    def capture(self, ids, cache, fixed):
        ids, start = ids.clone(), torch.empty(ids.shape[0], dtype=torch.int64)
        counts[tuple(ids.shape)] = counts.get(tuple(ids.shape), 0) + 1
        seen = cache.seen

        def run():  # lengths on the host are those of the capture, as in a graph
            now = cache.seen
            cache.advance(seen - now, cache.lengths)
            logits = self._run(ids, start, cache)
            cache.advance(now - seen, cache.lengths)
            return logits

        logits = torch.empty(*ids.shape, CONFIG.vocab_size, dtype=torch.float64)
        return decode._Graph(StandIn(run, logits), ids, start, logits, fixed)

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    return counts


def pair(model, ids, **inputs):
    """Caches after a prompt, one of them with graphs."""
    caches = KimiLinearCache(CONFIG), KimiLinearCache(CONFIG)
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache, **inputs)
    caches[0].graphs = DecodeGraphs(model)
    return caches


def agree(model, caches, ids):
    with torch.no_grad():
        a, b = (model(ids, past_key_values=cache).logits for cache in caches)
    assert_as_good_as(f"after {caches[0].seen}", a, b, b)
    assert caches[0].seen == caches[1].seen


@pytest.mark.parametrize("T", [1, 2, DECODE_TOKENS])
@pytest.mark.parametrize("padded", [False, True])
def test_static_layout(model, monkeypatch, T, padded):
    """The whole buffer and positions on the device, against slices of it."""
    ids, mask = random_ids(CONFIG, 2, 60), torch.ones(2, 10, dtype=torch.int64)
    mask[0, 3:7] = int(not padded)
    found = []
    for static in (True, False):
        monkeypatch.setattr(modeling, "use_triton", lambda x, static=static: static)
        cache, logits = KimiLinearCache(CONFIG), []
        cache.plan(100 if static else 0)
        with torch.no_grad():
            model(ids[:, :10], attention_mask=mask, past_key_values=cache)
            for t in range(10, 10 + 4 * T, T):
                logits.append(model(ids[:, t : t + T], past_key_values=cache).logits)
        found.append(torch.cat(logits, 1))
    assert_as_good_as("logits", *found, found[1])


def test_each_shape_is_captured_once(model, captures):
    ids = random_ids(CONFIG, 2, 100)
    caches = pair(model, ids[:, :10])
    for cache in caches:
        cache.plan(100)
        cache.reserve(80)
    t = 10
    for T in (1, 1, 1, 1, 4, 4, 1, 4, 1, 1):
        agree(model, caches, ids[:, t : t + T])
        t += T
    assert captures == {(2, 1): 1, (2, 4): 1}


def test_padded_rows(model, captures):
    ids, mask = random_ids(CONFIG, 3, 60), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5], mask[2, 4:9] = 0, 0
    caches = pair(model, ids[:, :12], attention_mask=mask)
    for t in range(12, 22):
        agree(model, caches, ids[:, t : t + 1])
    assert torch.equal(caches[0].lengths, torch.tensor([17, 22, 17]))
    assert torch.equal(caches[0].lengths, caches[1].lengths)


def test_captured_again_when_a_tensor_has_moved(model, captures):
    """Growth, restore, other rows; not by reordering."""
    ids = random_ids(CONFIG, 2, 300)
    caches = pair(model, ids[:, :10])
    t = 10

    def go(n):
        nonlocal t
        for _ in range(n):
            agree(model, caches, ids[: caches[0].batch_size, t : t + 1])
            t += 1

    go(4)
    before = captures[2, 1]
    go(40)
    assert before < captures[2, 1] <= before + 5  # a constant factor each time
    marks, at, before = [c.snapshot() for c in caches], t, captures[2, 1]
    go(3)
    for c, mark in zip(caches, marks, strict=True):
        c.restore(mark)
    t = at
    go(3)
    assert captures[2, 1] > before
    before = captures[2, 1]
    for rows in ([1, 0], [1, 1]):
        with torch.no_grad():
            for c in caches:
                c.reorder_cache(torch.tensor(rows))
        go(2)
    assert captures[2, 1] == before
    for c in caches:
        c.batch_select_indices(torch.tensor([1]))
    go(3)
    assert captures[1, 1] == 1


def test_a_snapshot_keeps_its_latents_when_rows_are_reordered(model):
    ids = random_ids(CONFIG, 2, 30)
    cache, twin = pair(model, ids[:, :10])
    mark = cache.snapshot()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.restore(mark)
    cache.graphs = None
    agree(model, (cache, twin), ids[:, 10:11])


def test_other_calls_come_between(model, captures):
    """A prompt's next part, hidden states: both advance the cache by themselves."""
    ids = random_ids(CONFIG, 2, 100)
    caches = pair(model, ids[:, :10])
    for cache in caches:
        cache.plan(100)
        cache.reserve(80)
    for a, b in ((10, 11), (11, 12), (12, 40), (40, 41)):
        agree(model, caches, ids[:, a:b])
    with torch.no_grad():
        out = [model(ids[:, 41:42], past_key_values=c, output_hidden_states=True) for c in caches]
    assert all(len(o.hidden_states) == 5 for o in out)
    agree(model, caches, ids[:, 42:43])
    assert captures == {(2, 1): 1}


def test_copies_have_no_graphs(model, captures):
    ids = random_ids(CONFIG, 1, 20)
    caches = pair(model, ids[:, :10])
    agree(model, caches, ids[:, 10:11])
    agree(model, caches, ids[:, 11:12])
    fork = caches[0].fork()
    assert fork.graphs is None and caches[0].graphs is not None
    agree(model, caches, ids[:, 12:13])
    with torch.no_grad():
        model(ids[:, 12:13], past_key_values=fork)
    assert fork.seen == caches[0].seen


def test_wrong_batch_is_named(model, captures):
    ids = random_ids(CONFIG, 2, 20)
    caches = pair(model, ids[:, :10])
    agree(model, caches, ids[:, 10:11])
    with torch.no_grad(), pytest.raises(ValueError, match="holds 2 sequences, but the input has 1"):
        model(ids[:1, :1], past_key_values=caches[0])


def test_a_failed_capture_warns_once_and_decodes(model, monkeypatch):
    def fail(*args):
        raise RuntimeError("no graph today")

    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    ids = random_ids(CONFIG, 2, 20)
    caches = pair(model, ids[:, :10])
    agree(model, caches, ids[:, 10:11])
    with pytest.warns(UserWarning, match="without a CUDA graph: no graph today"):
        agree(model, caches, ids[:, 11:12])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(12, 16):
            agree(model, caches, ids[:, t : t + 1])


def test_what_cannot_be_captured(model, monkeypatch):
    monkeypatch.setattr(decode, "use_triton", lambda x: True)
    assert why_not_captured(model) is None
    graphs = decode_graphs(model, None)
    assert decode_graphs(model, graphs) is graphs
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert decode_graphs(model, graphs) is not graphs
    model.enable_input_require_grads()  # a hook that checkpointing leaves behind
    assert why_not_captured(model) is None
    norm = model.model.norm
    hook = norm.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="graph: model.norm has a hook, or a forward of its own"):
        assert decode_graphs(model, graphs) is None
    hook.remove()
    norm.forward = norm.forward
    assert "model.norm has a hook" in why_not_captured(model)
    del norm.forward
    model.model.layers[2]._hf_hook = object()
    with pytest.warns(UserWarning, match="graph: model.layers.2 has a hook of accelerate"):
        assert decode_graphs(model, None) is None
    monkeypatch.setattr(decode, "use_triton", lambda x: False)
    assert "in PyTorch" in why_not_captured(model)


# ---- long prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
def test_prompt_in_pieces(monkeypatch, padded, embeds):
    """Of 2 rows, after others, one of which begins with more padding than a piece has columns."""
    model, ids = build(CONFIG).double(), random_ids(CONFIG, 2, 60)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :25], mask[1, 40] = 0, 0
    given = {"input_ids": ids[:, 7:]}
    if embeds:
        given = {"inputs_embeds": model.model.embed_tokens(ids[:, 7:]).detach()}
    found = []
    for piece in (modeling.PIECE, 18):
        monkeypatch.setattr(modeling, "PIECE", piece)
        cache = KimiLinearCache(CONFIG)
        with torch.no_grad():
            model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
            out = model(**given, attention_mask=mask, past_key_values=cache)
            after = model(ids[:, :1], past_key_values=cache).logits
        assert out.past_key_values is cache and cache.seen == 61
        found.append((out.logits, after))
    for got, want in zip(found[1], found[0], strict=True):
        assert_as_good_as("logits", got, want, want)


def test_pieces_only_where_a_cache_is_filled_and_nothing_else_is_asked(monkeypatch):
    model, ids = build(CONFIG), random_ids(CONFIG, 1, 40)
    calls = []
    forward = model.model.layers[0].forward
    monkeypatch.setattr(
        model.model.layers[0], "forward", lambda x, *a, **k: calls.append(1) or forward(x, *a, **k)
    )
    monkeypatch.setattr(modeling, "PIECE", 16)
    for options, pieces in (
        ({}, 3),
        ({"use_cache": False}, 1),
        ({"output_hidden_states": True}, 1),
        ({"position_ids": torch.arange(40)[None]}, 3),
        ({"position_ids": torch.arange(40)[None] % 20}, 1),
    ):
        calls.clear()
        with torch.no_grad():
            model(ids, **options)
        assert len(calls) == pieces, options
    calls.clear()
    model(ids, labels=ids)
    assert len(calls) == 1
    calls.clear()
    model.train().config.router_aux_loss_coef = 0.1
    with torch.no_grad():
        assert model(ids, labels=ids, use_cache=True).aux_loss > 0
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["o_norm", "conv1d", "q_proj", "f_b", "norm", "mla", "kv", "mlp"])
def test_a_hook_changes_a_step_as_it_does_the_whole(name):
    """Kernels that take a module's weight, instead of calling it, see it."""
    model, ids = build(CONFIG).double(), random_ids(CONFIG, 2, 12)
    layers = model.model.layers
    kda, mla = (layers[CONFIG.layer_types.index(f"{x}_attention")].self_attn for x in KINDS)
    modules = {"f_b": kda.forget_gate.f_b_proj, "norm": layers[1].input_layernorm}
    modules |= {"mla": mla.o_proj, "kv": mla.kv_b_proj}
    modules["mlp"] = layers[1].mlp.shared_experts.down_proj
    before = model(ids).logits

    def double(module, args, output):
        if isinstance(output, Tensor):
            return 2 * output
        return tuple(2 * x for x in output[0]), output[1]  # of the convolution, and its state

    (modules.get(name) or getattr(kda, name)).register_forward_hook(double)
    cache, want = KimiLinearCache(CONFIG), model(ids).logits
    assert not torch.allclose(want, before)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        got = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
    assert_as_good_as("logits", torch.cat(got, 1), want[:, 9:], want[:, 9:])


def test_graphs_serve_generate_alone(model, captures):
    """Then weights may move: a later call of the model does not see those at the old places."""
    ids = random_ids(CONFIG, 1, 20)
    cache, _ = pair(model, ids[:, :10])
    model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=96)
    assert captures and not cache.graphs.active
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert cache.graphs.graphs[1, 1].seen == cache.seen - 1
