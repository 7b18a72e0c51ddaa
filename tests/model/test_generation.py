"""generate: every mode gives what plain forwards over the whole sequence give, or a ValueError."""

import string
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
)

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from tests.model.helpers import build, random_ids, small_config

CONFIG = small_config((2, 5), num_hidden_layers=5)  # MLA before, between and after KDA layers
PAD, EOS = CONFIG.pad_token_id, CONFIG.eos_token_id
PROMPT = random_ids(CONFIG, 2, 70)
ROWS = [random_ids(CONFIG, n, seed=n) for n in (9, 3, 66, 1)]
N = 7  # new tokens


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    """With a generation config that says nothing but how to pad: no default ends a text early."""
    model = build(CONFIG)
    model.generation_config = GenerationConfig(pad_token_id=PAD, max_new_tokens=N, do_sample=False)
    return model


@torch.no_grad()
def greedy(model, ids: Tensor, n: int = N) -> Tensor:
    """`ids` [B, T] and n more tokens, by one forward over everything per token."""
    for _ in range(n):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    T = max(map(len, rows))
    ids = torch.stack([torch.cat((x.new_full((T - len(x),), PAD), x)) for x in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def filled(model, ids: Tensor, **kwargs) -> KimiLinearCache:
    cache = KimiLinearCache(CONFIG)
    with torch.no_grad():
        model(ids, past_key_values=cache, **kwargs)
    return cache


# ---- one turn -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 64},
        {"prefill_chunk_size": 70},
        {"prefill_chunk_size": 100},
        {"position_ids": torch.arange(70)[None]},
        {"attention_mask": torch.ones(2, 70)},
        {"output_router_logits": True},
        {"logits_to_keep": 0},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=str,
)
def test_greedy(options, model):
    assert torch.equal(model.generate(PROMPT, **options), greedy(model, PROMPT))


def test_a_prompt_of_one_token(model):
    assert torch.equal(model.generate(PROMPT[:, :1]), greedy(model, PROMPT[:, :1]))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 16}], ids=str)
def test_sampling_with_a_seed(options, model):
    draw = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "num_return_sequences": 3,
    }
    out = []
    for more in ({}, {}, options):
        torch.manual_seed(3)
        out.append(model.generate(PROMPT, **draw, **more))
    assert out[0].shape == (6, 70 + N) and torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0][0], out[0][1])


@pytest.mark.parametrize("returned", [1, 3])
def test_beam_search(returned, model):
    """The scores are those of a forward over the whole sequence; without a cache it is the same."""
    options = {"num_beams": 3, "num_return_sequences": returned, "length_penalty": 0.0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(PROMPT, **options)
    without = model.generate(PROMPT, use_cache=False, **options)
    assert torch.equal(out.sequences, without.sequences)
    with torch.no_grad():
        log_p = model(out.sequences, use_cache=False).logits.log_softmax(-1)[:, 69:-1]
    score = log_p.gather(2, out.sequences[:, 70:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, score, rtol=1e-5, atol=1e-4)
    best = out.sequences_scores.view(2, returned)
    assert (best.diff(dim=1) <= 0).all()
    with torch.no_grad():
        log_p = model(greedy(model, PROMPT), use_cache=False).logits.log_softmax(-1)[:, 69:-1]
    assert (best[:, 0] >= log_p.amax(-1).sum(1) - 1e-4).all()  # three beams find no worse


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 3, "prefill_chunk_size": 16},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_a_left_padded_batch_equals_its_rows(options, model):
    batch = model.generate(**left_padded(ROWS), **options)
    each = options.get("num_return_sequences", 1)
    for row, got in zip(ROWS, batch.split(each), strict=True):
        assert torch.equal(got[:, -N:], model.generate(row[None], **options)[:, -N:])


def test_padding_is_found_without_a_mask(model):
    batch = left_padded(ROWS)
    assert torch.equal(model.generate(batch["input_ids"]), model.generate(**batch))


def test_rows_that_end_early(model):
    """A finished row is filled with padding and does not disturb the others."""
    free = model.generate(**left_padded(ROWS))[:, -N:]
    end = int(free[0, 2])  # the third new token of the first row
    got = model.generate(**left_padded(ROWS), eos_token_id=end)[:, -N:]
    for row, want in zip(got, free, strict=True):
        n = (want == end).nonzero()[0, 0] + 1 if (want == end).any() else len(want)
        assert torch.equal(row[:n], want[:n]) and (row[n:] == PAD).all()
    alone = model.generate(ROWS[0][None], eos_token_id=[end, 1])
    assert alone[0, -1] == end and alone.shape[1] <= len(ROWS[0]) + 3
    later = model.generate(ROWS[0][None], eos_token_id=end, min_new_tokens=5)
    assert end not in later[0, 9 : 9 + 5]


def test_lengths(model):
    assert model.generate(PROMPT, max_new_tokens=1).shape == (2, 71)
    ids = model.generate(PROMPT, max_length=75, max_new_tokens=None)
    assert torch.equal(ids, greedy(model, PROMPT, 5))


def test_scores_logits_and_hidden_states(model):
    want = greedy(model, PROMPT)
    keys = ("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate")
    out = model.generate(PROMPT, **dict.fromkeys(keys, True))
    assert torch.equal(out.sequences, want)
    with torch.no_grad():
        logits = model(want, use_cache=False).logits[:, 69:-1]
    for i in range(N):
        torch.testing.assert_close(out.logits[i], logits[:, i], rtol=1e-4, atol=1e-4)
        assert torch.equal(out.scores[i], out.logits[i])
        assert out.hidden_states[i][-1].shape == (2, 70 if i == 0 else 1, CONFIG.hidden_size)
    cache = out.past_key_values
    assert isinstance(cache, KimiLinearCache) and cache.get_seq_length() == 70 + N - 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_embeddings_as_prompt(options, padded, model):
    batch = left_padded(ROWS) if padded else {"input_ids": PROMPT}
    want = model.generate(**batch, **options)[:, -N:]
    embeds = model.model.embed_tokens(batch["input_ids"]).detach()
    mask = {"attention_mask": batch["attention_mask"]} if padded else {}
    assert torch.equal(model.generate(inputs_embeds=embeds, **mask, **options), want)
    assert torch.equal(model.generate(**batch, inputs_embeds=embeds, **options)[:, -N:], want)


def test_guidance(model):
    """Classifier-free guidance runs a second sequence, from the last prompt token on."""
    scale, ids = 1.5, PROMPT[:1]
    got = model.generate(ids, guidance_scale=scale)
    for _ in range(N):
        with torch.no_grad():
            a, b = (model(x).logits[:, -1].log_softmax(-1) for x in (ids, ids[:, 69:]))
        ids = torch.cat((ids, (scale * (a - b) + b).argmax(-1, keepdim=True)), 1)
    assert torch.equal(got, ids)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character; the rest of the vocabulary is <10>, <11>, ..."""
    letters = string.ascii_letters + string.digits + " .,;:!?'()+-*/="
    vocab = {"<pad>": PAD, "<bos>": 1, "<eos>": EOS}
    to_byte = {c: pre_tokenizers.ByteLevel(False).pre_tokenize_str(c)[0][0] for c in letters}
    vocab |= {to_byte[c]: i + 3 for i, c in enumerate(letters)}
    vocab |= {f"<{i}>": i for i in range(len(vocab), CONFIG.vocab_size)}
    tokens = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def test_stop_strings(model):
    tokenizer = letter_tokenizer()
    batch = tokenizer(["What is 6 * 7?"], return_tensors="pt")
    ids = model.generate(**batch)[0, -N:]
    stop = tokenizer.decode(ids[2:4])
    got = model.generate(**batch, stop_strings=[stop], tokenizer=tokenizer)[0, 14:]
    assert torch.equal(got, ids[:4])


def test_streaming(model):
    tokenizer = letter_tokenizer()
    batch = tokenizer(["What is 6 * 7?"], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**batch, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    want = greedy(model, batch["input_ids"])[0, -N:]
    assert len(batch["input_ids"][0]) == 14 and text == tokenizer.decode(want) != ""
    two = tokenizer(["Hi", "What is 6 * 7?"], padding=True, return_tensors="pt")
    assert tokenizer.decode(model.generate(**two)[1, -N:]) == text


# ---- a cache that the caller holds --------------------------------------------------------------


def test_turns_with_one_cache(model):
    """Each turn passes the whole conversation; the cache runs what it has not seen."""
    cache, ids, mask = KimiLinearCache(CONFIG), torch.ones(3, 0).long(), torch.ones(3, 0).long()
    for turn, lengths in enumerate([(9, 3, 66), (2, 1, 1), (1, 70, 5)]):
        new = left_padded([random_ids(CONFIG, n, seed=turn + n) for n in lengths])
        ids, mask = (
            torch.cat((ids, new["input_ids"]), 1),
            torch.cat((mask, new["attention_mask"]), 1),
        )
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache)
        mask = torch.cat((mask, mask.new_ones(3, N)), 1)
        assert cache.seen == ids.shape[1] - 1  # the last token has not been run yet
        for row, real in zip(ids, mask.bool(), strict=True):
            want = greedy(model, row[real][None, :-N])
            assert torch.equal(row[real][None], want)


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("seen", [1, 40, 69])
def test_a_cache_that_holds_part_of_the_prompt(seen, has_padding, model):
    mask = torch.ones(2, 70).long()
    mask[0, : 20 * has_padding] = 0
    ids = PROMPT.masked_fill(mask == 0, PAD)
    want = model.generate(ids, attention_mask=mask)
    options = {"attention_mask": mask}
    caches = [filled(model, ids[:, :seen], attention_mask=mask[:, :seen]) for _ in range(3)]
    assert torch.equal(model.generate(ids, past_key_values=caches[0], **options), want)
    new = model.generate(ids[:, seen:], past_key_values=caches[1], **options)  # only the new ids
    assert torch.equal(new, want[:, seen:])
    caches[2].batch_repeat_interleave(3)  # one row per beam
    beams = model.generate(ids, past_key_values=caches[2], num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, **options))


def test_forks_and_snapshots(model):
    """One prompt, several continuations, none of which sees another."""
    cache = filled(model, PROMPT)
    snapshot, question = cache.snapshot(), [random_ids(CONFIG, 2, n, seed=n) for n in (5, 1, 66)]
    for q in question:
        ids = torch.cat((PROMPT, q), 1)
        want = greedy(model, ids)
        assert torch.equal(model.generate(ids, past_key_values=cache.fork()), want)
        assert cache.seen == 70
        assert torch.equal(model.generate(ids, past_key_values=cache), want)
        cache.restore(snapshot)


def test_a_fresh_cache_serves_any_number_of_beams(model):
    cache = KimiLinearCache(CONFIG)
    got = model.generate(PROMPT, past_key_values=cache, num_beams=3)
    assert torch.equal(got, model.generate(PROMPT, num_beams=3)) and cache.batch_size == 6


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("seen", [70, 60])
def test_a_cache_that_leaves_nothing_to_run(seen, chunk, model):
    """transformers would cut these sequences at the wrong end, and run tokens twice or never."""
    cache, ids = filled(model, PROMPT), PROMPT[:, :seen]
    embeds = model.model.embed_tokens(ids).detach()
    for prompt in ({"inputs": ids}, {"inputs": ids, "attention_mask": torch.ones(2, seen)}):
        with pytest.raises(ValueError):
            model.generate(**prompt, past_key_values=cache, prefill_chunk_size=chunk)
    with pytest.raises(ValueError):
        model.generate(inputs_embeds=embeds, past_key_values=cache, prefill_chunk_size=chunk)
    with pytest.raises(ValueError):  # new ids alone need the mask of the whole sequence
        model.generate(PROMPT[:, :5], past_key_values=cache, prefill_chunk_size=chunk)
    assert cache.seen == 70
    assert torch.equal(
        model.generate(greedy(model, PROMPT, 1), past_key_values=cache),
        greedy(model, PROMPT, N + 1),
    )


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {  # name: (what the message says, options)
    "static": ("cache_implementation", {"cache_implementation": "static"}),
    "offloaded static": ("cache_implementation", {"cache_implementation": "offloaded_static"}),
    "quantized": ("cache_implementation", {"cache_implementation": "quantized"}),
    "offloaded": ("cache_implementation", {"cache_implementation": "offloaded"}),
    "DynamicCache": ("past_key_values is a DynamicCache", {"past_key_values": DynamicCache()}),
    "StaticCache": (
        "past_key_values is a StaticCache",
        {"past_key_values": StaticCache(config=CONFIG, max_cache_len=90)},
    ),
    "a cache, not used": (
        "use_cache",
        {"past_key_values": KimiLinearCache(CONFIG), "use_cache": False},
    ),
    "prompt lookup": ("assisted generation", {"prompt_lookup_num_tokens": 3}),
    "early exit": ("assisted generation", {"assistant_early_exit": 1}),
    "contrastive search": ("trust_remote_code", {"penalty_alpha": 0.6, "top_k": 4}),
    "DoLa": ("trust_remote_code", {"dola_layers": "low"}),
    "group beams": (
        "trust_remote_code",
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    ),
    "constrained beams": ("trust_remote_code", {"num_beams": 3, "force_words_ids": [[5]]}),
    "attentions": (
        "output_attentions is not an argument",
        {"output_attentions": True, "return_dict_in_generate": True},
    ),
    "token types": ("token_type_ids", {"token_type_ids": torch.zeros(2, 70, dtype=torch.long)}),
    "packed": ("packed documents", {"position_ids": torch.arange(70)[None] % 35}),
    "chunks without cache": ("without a cache", {"prefill_chunk_size": 8, "use_cache": False}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, model):
    message, options = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **options)


def test_an_empty_prompt_is_refused(model):
    none, mask = PROMPT[:, :0], {"attention_mask": PROMPT[:, :0]}
    for args, options in (((none,), {}), ((), {"input_ids": none} | mask), ((), {"inputs": none})):
        with pytest.raises(ValueError, match=r"input_ids has shape \[2, 0\], want at least one"):
            model.generate(*args, **options, max_new_tokens=2)


def test_refused_caches(model):
    cache = filled(model, PROMPT[:1, :5])
    for options in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        with pytest.raises(ValueError, match="holds 1 sequences, but the input has 3 rows"):
            model.generate(PROMPT[:1], past_key_values=cache, **options)
    assert cache.seen == 5
    with pytest.raises(ValueError, match="linear_attention"):
        model.generate_batch([[3, 4, 5], [5, 6]])
