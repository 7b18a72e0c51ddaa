"""generate with drafted tokens: the same tokens as without. Their rejection: test_rollback.py."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from kimi_kernels import backend
from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear import modeling_kimi_linear as modeling
from kimi_linear.decode import DecodeGraphs
from kimi_linear.rollback import RECORDED
from tests.helpers import DEVICE
from tests.model import test_decode as standins
from tests.model.helpers import build, random_ids, small_config
from tests.model.test_cache import assert_same, assert_unchanged, frozen, run, states

CONFIG = small_config()
PROMPT = random_ids(CONFIG, 1, 30)
N = 24  # new tokens
captures = standins.captures  # a fixture


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return quiet(build(CONFIG))


def quiet(model, **changes):
    """With a generation config that drafts seven tokens, however unlikely."""
    model.generation_config = GenerationConfig(
        pad_token_id=0, max_new_tokens=N, do_sample=False, num_assistant_tokens=7,
        num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0, **changes,
    )  # fmt: skip
    return model


def assistants(model) -> dict:
    """Good, bad, and right now and then."""
    torch.manual_seed(0)
    fair = quiet(build(CONFIG))
    with torch.no_grad():
        for p in fair.parameters():
            p += 0.01 * p.std() * torch.randn_like(p)
    bad = quiet(build(small_config((1,), num_hidden_layers=2, kv_lora_rank=12), seed=7))
    return {"good": model, "fair": fair, "bad": bad}


# ---- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 7, 20])
@pytest.mark.parametrize("kind", ["good", "fair", "bad"])
def test_an_assistant(kind, drafts, model):
    want = model.generate(PROMPT)
    assistant = assistants(model)[kind]
    assistant.generation_config.num_assistant_tokens = drafts
    cache = KimiLinearCache(CONFIG)
    out = model.generate(
        PROMPT, assistant_model=assistant, past_key_values=cache, return_dict_in_generate=True
    )
    assistant.generation_config.num_assistant_tokens = 7
    assert torch.equal(out.sequences, want) and out.past_key_values is cache
    assert cache.seen == 30 + N - 1 and not cache.rollback.on
    other = KimiLinearCache(CONFIG)
    run(model, want[:, :-1], other)
    for a, b in zip(states(cache), states(other), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 8},
        {"attention_mask": torch.ones(1, 30).long()},
        {"logits_to_keep": 0},
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.3},
        {"eos_token_id": "the fifth"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bad", "lookup"])
def test_options(options, kind, model):
    prompt, options = torch.cat((PROMPT, PROMPT[:, :12]), 1), dict(options)
    if "attention_mask" in options:
        options["attention_mask"] = torch.ones(1, 42).long()
    if "eos_token_id" in options:
        options["eos_token_id"] = int(model.generate(prompt)[0, 46])
    extra = {"prompt_lookup_num_tokens": 7}
    if kind == "bad":
        extra = {"assistant_model": assistants(model)["bad"]}
    assert torch.equal(
        model.generate(prompt, **extra, **options), model.generate(prompt, **options)
    )


def test_a_prompt_of_one_token(model):
    """Whose drafts the assistant drops down to an empty cache."""
    for x in (*({"assistant_model": a} for a in assistants(model).values()),):
        assert torch.equal(model.generate(PROMPT[:, :1], **x), model.generate(PROMPT[:, :1]))


def test_a_long_prompt(model):
    """More than is recorded, of which the assistant drops the last token again."""
    ids = random_ids(CONFIG, 1, RECORDED + 20)
    for x in ({"assistant_model": assistants(model)["bad"]}, {"prompt_lookup_num_tokens": 7}):
        got = model.generate(ids, max_new_tokens=5, **x)
        assert torch.equal(got, model.generate(ids, max_new_tokens=5))


def test_a_padded_prompt(model):
    ids = torch.cat((torch.zeros(1, 5, dtype=torch.long), PROMPT), 1)
    want = model.generate(PROMPT)
    for x in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": assistants(model)["fair"]}):
        got = model.generate(ids, attention_mask=(ids != 0).long(), **x)
        assert torch.equal(got[:, 5:], want)


def test_turns_with_one_cache(model):
    """Plain and assisted ones; each runs what the cache has not seen."""
    cache, fair = KimiLinearCache(CONFIG), assistants(model)["fair"]
    ids, plain = PROMPT, PROMPT
    for turn, x in enumerate(({"prompt_lookup_num_tokens": 7}, {}, {"assistant_model": fair})):
        ids = model.generate(ids, past_key_values=cache, **x)
        plain = model.generate(plain)
        assert torch.equal(ids, plain) and cache.seen == ids.shape[1] - 1
        new = random_ids(CONFIG, 1, (1, 40, 3)[turn], seed=turn)
        ids, plain = torch.cat((ids, new), 1), torch.cat((plain, new), 1)


def test_sampling_with_a_seed(model):
    draw = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    for x in ({"prompt_lookup_num_tokens": 7}, {"assistant_model": assistants(model)["fair"]}):
        out = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            out.append(model.generate(PROMPT, **draw, **x))
        assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


def test_scores_and_hidden_states(model):
    keys = ("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate")
    out = model.generate(PROMPT, prompt_lookup_num_tokens=7, **dict.fromkeys(keys, True))
    want = model.generate(PROMPT, **dict.fromkeys(keys, True))
    assert torch.equal(out.sequences, want.sequences)
    for a, b in zip(out.logits, want.logits, strict=True):
        assert_same(a, b)


def test_as_the_assistant_of_another_model(model):
    """That of a Llama, which rejects nearly all drafts: back by all of them, into the prompt."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=97, num_attention_heads=2, initializer_range=0.5, **sizes)
    llama = quiet(LlamaForCausalLM(config).eval(), eos_token_id=2)
    got = llama.generate(PROMPT, assistant_model=model)
    assert torch.equal(got, llama.generate(PROMPT))


REFUSED = {  # name: (what the message says, prompt, options)
    "rows": ("wants one", PROMPT.expand(2, -1), {}),
    "early exit": ("assistant_early_exit", PROMPT, {"assistant_early_exit": 1}),
    "own layers": ("use_mtp", PROMPT, {"use_mtp": True}),
    "long drafts": (
        "prompt_lookup_num_tokens is 256, want less",
        PROMPT,
        {"prompt_lookup_num_tokens": RECORDED},
    ),
    "no cache": ("use_cache", PROMPT, {"use_cache": False}),
    "new tokens alone": ("wants the whole", PROMPT, {"attention_mask": torch.ones(1, 50)}),
    "embeddings": ("wants input_ids", PROMPT, {"inputs_embeds": torch.zeros(1, 30, 48)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, model):
    message, prompt, options = REFUSED[name]
    if not {"assistant_early_exit", "prompt_lookup_num_tokens"} & set(options):
        options = options | {"prompt_lookup_num_tokens": 3}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **options)


def test_refused_with_an_assistant_or_a_cache(model):
    assistant = assistants(model)["bad"]
    assistant.generation_config.num_assistant_tokens = RECORDED
    with pytest.raises(ValueError, match="num_assistant_tokens is 256, want less than 256"):
        model.generate(PROMPT, assistant_model=assistant)
    cache = KimiLinearCache(CONFIG)
    run(model, PROMPT, cache)
    before = frozen(cache)
    with pytest.raises(ValueError, match="holds 30 columns, input_ids 30"):
        model.generate(PROMPT, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert_unchanged(cache, before)


# ---- captured steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["good", "fair", "bad"])
def test_captured_generation(kind, captures, monkeypatch):
    """Of both models, in fp64, on caches that stay where they are."""
    monkeypatch.setattr(modeling, "use_triton", lambda x: True)
    model = quiet(build(CONFIG).double())
    want = model.generate(PROMPT)
    assistant = {name: x.double() for name, x in assistants(model).items()}[kind]
    prepare, caches = KimiLinearForCausalLM._prepare_cache_for_generation, []

    def with_graphs(self, config, kwargs, *args):
        prepare(self, config, kwargs, *args)
        cache = kwargs["past_key_values"]
        if cache.graphs is None:
            cache.plan(100)
            cache.graphs = DecodeGraphs(self)
            caches.append(cache)
        cache.graphs.active = True

    monkeypatch.setattr(KimiLinearForCausalLM, "_prepare_cache_for_generation", with_graphs)
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant), want)
    assert len(caches) == 2
    assert any(x is not None for cache in caches for x in cache.graphs.graphs.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["good", "fair", "bad", "lookup"])
def test_generation_on_a_gpu(kind):
    model = quiet(build(CONFIG).to(DEVICE))
    ids, options = PROMPT.to(DEVICE), {"prompt_lookup_num_tokens": 7}
    if kind != "lookup":
        options = {"assistant_model": assistants(model)[kind].to(DEVICE)}
    out = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, model.generate(ids))
    with backend("reference"):
        assert torch.equal(out.sequences, model.generate(ids))
    graphs = out.past_key_values.graphs
    assert not graphs.failed and any(graph is not None for graph in graphs.graphs.values())
