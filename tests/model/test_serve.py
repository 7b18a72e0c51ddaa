"""`kimi-linear serve`, through OpenAI's own client."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from kimi_linear import KimiLinearForCausalLM, KimiLinearTokenizer
from kimi_linear.chat import Chat
from kimi_linear.cli import main
from kimi_linear.serve import build_app, listen
from kimi_linear.tool_calls import SECTION_BEGIN, SECTION_END, format_tool_calls

from .test_chat import CALLS, TOOL
from .test_chat_cli import MESSAGES, TINY, say_only, tiny, words
from .tokenizer_helpers import BASE, write_released

ROOT = TINY.parents[1]
USER: list[Any] = [{"role": "user", "content": MESSAGES[0]}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory as the released one, with a model whose answers are words."""
    folder = write_released(tmp_path_factory.mktemp("released"))
    tokenizer = KimiLinearTokenizer.from_pretrained(folder)
    model = tiny()
    say_only(model, [*words(tokenizer), *tokenizer.stop_ids])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved) -> KimiLinearForCausalLM:
    return KimiLinearForCausalLM.from_pretrained(saved)


@pytest.fixture(scope="module")
def tokenizer(saved) -> KimiLinearTokenizer:
    return KimiLinearTokenizer.from_pretrained(saved)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def served(saved) -> Iterator[KimiLinearForCausalLM]:
    """The model that the server of `client` has."""
    return KimiLinearForCausalLM.from_pretrained(saved)


@pytest.fixture(scope="module")
def client(saved, served) -> Iterator[openai.OpenAI]:
    app = build_app(served, KimiLinearTokenizer.from_pretrained(saved), "tiny")
    with listen("127.0.0.1", 0) as address:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([address],), daemon=True)
        thread.start()
        try:
            with client_of(f"http://127.0.0.1:{address.getsockname()[1]}/v1") as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def prompt_of(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)[
        "input_ids"
    ]


def generated(model, tokenizer, ids: list[int], n: int = 12) -> list[int]:
    """What `generate` gives without a server."""
    row = torch.tensor([ids])
    out = model.generate(
        row, do_sample=False, max_new_tokens=n, eos_token_id=tokenizer.stop_ids, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def chat(client, messages: Any = USER, **fields) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **(GREEDY | fields))


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


def test_models(client):
    [model] = client.models.list()
    assert (model.id, model.object) == ("tiny", "model")


@pytest.mark.parametrize("n", [12, 100])
def test_greedy_answer_is_that_of_generate(client, model, tokenizer, n):
    prompt = prompt_of(tokenizer, USER)
    ids = generated(model, tokenizer, prompt, n)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for field in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{"max_tokens": None, field: n})
        assert answer.model == "tiny" and text_of(answer) == text
        assert answer.choices[0].finish_reason == ("length" if len(ids) == n else "stop")
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(ids)
    *chunks, last = chat(client, max_tokens=n, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 6
    assert last.choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.usage == answer.usage


def test_conversation(client, model, tokenizer):
    own = Chat(model, tokenizer, "Be brief.", {"do_sample": False, "max_new_tokens": 12})
    messages = [{"role": "system", "content": "Be brief."}]
    for text in MESSAGES[:3]:
        parts = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
        messages.append({"role": "user", "content": parts})
        answer = text_of(chat(client, messages))
        assert answer == own.reply(text)
        messages.append({"role": "assistant", "content": answer})


def test_text_completion(client, model, tokenizer):
    ids = generated(model, tokenizer, tokenizer(MESSAGES[0]).input_ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    fields = {"model": "tiny", "prompt": MESSAGES[0]} | GREEDY
    assert client.completions.create(**fields).choices[0].text == text
    chunks = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_stop(client):
    text = text_of(chat(client))
    stop = text.split()[2]
    ended = text[: text.index(stop) + len(stop)]
    for given in (stop, ["not said", stop]):
        answer = chat(client, stop=given)
        assert text_of(answer) == ended  # transformers leaves the stop text in
        assert answer.choices[0].finish_reason == "stop"


def test_sampling(client):
    def sample(seed=1, **fields) -> str:
        return text_of(chat(client, temperature=2, seed=seed, **fields))

    greedy = text_of(chat(client))
    assert sample() == sample() != greedy
    assert sample() != sample(2)
    assert text_of(chat(client, temperature=None, seed=1)) != greedy  # sampling is the default
    assert sample(top_p=1e-6) == greedy
    for certain in ({"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-3}):
        for given in (json.dumps(certain), certain):
            assert sample(extra_body={"generation_config": given}) == greedy
    penalty = {"generation_config": '{"repetition_penalty": 1e-4}'}
    assert text_of(chat(client, extra_body=penalty)) != greedy
    assert text_of(chat(client, frequency_penalty=-0.9999)) == text_of(
        chat(client, extra_body=penalty)
    )


def test_logit_bias(client, tokenizer):
    [word, other] = words(tokenizer)[:2]
    text = tokenizer.decode([word]) * 12
    bias = {str(word): 100, str(other): -100}
    assert text_of(chat(client, logit_bias=bias)) == text
    fields = {"model": "tiny", "prompt": MESSAGES[0], "logit_bias": bias} | GREEDY
    assert client.completions.create(**fields).choices[0].text == text


NEUTRAL = {
    "logit_bias": {},
    "n": 1,
    "logprobs": False,
    "presence_penalty": 0.0,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "stream_options": {"include_usage": True},
    "user": "me",
}


def test_ignored_fields_that_ask_for_nothing(client):
    assert text_of(chat(client, **NEUTRAL)) == text_of(chat(client))


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"messages": []}, "messages: got []"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "got the role 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "needs tool_call_id"),
        ({"temperature": -1}, "temperature: got -1.0, want at least 0"),
        ({"temperature": "hot"}, "hot"),
        ({"top_p": 2}, "top_p: got 2.0, want more than 0 and at most 1"),
        ({"frequency_penalty": -2}, "repetition_penalty: got -1.0, want more than 0"),
        ({"max_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"stop": ["a", ""]}, "stop: got ['a', '']"),
        ({"n": 2}, "n: got 2, which this server does not support"),
        ({"logprobs": True}, "logprobs: got True"),
        ({"presence_penalty": 0.5}, "presence_penalty: got 0.5"),
        ({"response_format": SCHEMA}, "response_format: got"),
        ({"logit_bias": {"a": 1}}, "logit_bias: got the token 'a'"),
        ({"logit_bias": {"2304": 1}}, "want 0 to 2303"),
        ({"logit_bias": [1]}, "logit_bias: got [1], want an object"),
        ({"tools": ["f"]}, "tools: got ['f']"),
        ({"tool_choice": "required"}, "tool_choice: got 'required'"),
        ({"extra_body": {"generation_config": "{"}}, "Expecting property name"),
        ({"extra_body": {"generation_config": "[]"}}, "generation_config: got []"),
        ({"extra_body": {"generation_config": '{"x": 1}'}}, "generation_config: got {'x': 1}"),
        ({"extra_body": {"generation_config": '{"top_k": "a"}'}}, "top_k: got a"),
        ({"model": "other"}, "other"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client, fields, message, stream):
    fields = {"model": "tiny", "messages": USER} | fields
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**fields, stream=stream)
    assert message in error.value.message


def test_other_bad_requests(client):
    with pytest.raises(openai.UnprocessableEntityError, match=r"Unexpected fields.*top_k"):
        chat(client, extra_body={"top_k": 1})
    with pytest.raises(openai.BadRequestError, match="prompt must be a string"):
        client.completions.create(model="tiny", prompt=["a"])
    with pytest.raises(openai.BadRequestError, match="suffix: got 'b'"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError, match="kimi-linear serves /v1/chat/completions"):
        client.responses.create(model="tiny", input="a")


@pytest.fixture
def say(served, monkeypatch):
    """Make the server's model say a text; the prompts that it gets for it."""

    def use(ids: list[int]) -> list[list[int]]:
        prompts = []

        def generate(input_ids, streamer=None, **_):
            prompts.append(input_ids[0].tolist())
            if streamer is not None:
                streamer.put(input_ids)
                for i in ids:
                    streamer.put(torch.tensor([i]))
                streamer.end()
            return torch.cat((input_ids, torch.tensor([ids])), 1)

        monkeypatch.setattr(served, "generate", generate)
        return prompts

    return use


def test_tool_calls(client, tokenizer, say):
    prompts = say(tokenizer.encode(f"So: {format_tool_calls(CALLS)}<|im_end|>"))
    answer = chat(client, tools=[TOOL], max_tokens=500)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content == "So: "
    wanted = [call["function"] for call in CALLS]
    assert [call.function.model_dump() for call in message.tool_calls] == wanted
    chunks = list(chat(client, tools=[TOOL], max_tokens=500, stream=True))
    deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [call.function.model_dump() for call in deltas] == wanted
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert prompts == [prompt_of(tokenizer, USER, tools=[TOOL])] * 2
    # The next turn, with what the client has: the calls are written as the model wrote them.
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    say(tokenizer.encode("Fine.<|im_end|>"))
    messages = [*USER, message.model_dump(exclude_none=True), *results]
    prompts = say(tokenizer.encode("Fine.<|im_end|>"))
    assert text_of(chat(client, messages, tools=[TOOL])) == "Fine."
    assert tokenizer.decode(prompts[0]).count("sunny") == len(CALLS)
    assert prompts == [prompt_of(tokenizer, messages, tools=[TOOL])]


def test_malformed_tool_calls(client, tokenizer, say):
    """What a model writes is never the request's fault: bad arguments are text, else content."""
    section = format_tool_calls(CALLS[:1])
    bare = section.replace("functions.", "")
    for text, content, arguments in (
        (section.replace('"}', '"'), "", ['{"city": "北京"']),  # no JSON
        (section[: section.index("京")], "", ['{"city": "北']),  # cut off
        (f"So: {bare}", "So: " + bare[len(SECTION_BEGIN) : -len(SECTION_END)], []),
    ):
        say(tokenizer.encode(text))
        for stream in (False, True):
            answer = chat(client, stream=stream)
            parts = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
            assert "".join(part.content or "" for part in parts) == content
            calls = [call for part in parts for call in part.tool_calls or ()]
            assert [call.function.arguments for call in calls] == arguments


# ---- the command --------------------------------------------------------------------------------


def test_command(saved, model, tokenizer):
    command = [sys.executable, "-m", "kimi_linear.cli", "serve", saved, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"{saved.name} at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line
        ids = generated(model, tokenizer, prompt_of(tokenizer, USER))
        with client_of(found[1]) as client:
            [entry] = client.models.list()
            answer = client.chat.completions.create(model=entry.id, messages=USER, **GREEDY)
        assert text_of(answer) == tokenizer.decode(ids, skip_special_tokens=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def failure(capsys, *arguments: object) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kimi-linear serve: ") and error.count("\n") == 1
    return error


def test_wrong_arguments(saved, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Address already in use" in failure(capsys, saved, "--port", port)
    assert "--port 70000" in failure(capsys, saved, "--port", 70000)
    assert "--host 192.0.2.1" in failure(capsys, saved, "--host", "192.0.2.1", "--port", 0)
    assert "nowhere does not exist" in failure(capsys, "nowhere")
    assert "--device gpu: " in failure(capsys, saved, "--port", 0, "--device", "gpu")
    write_released(tmp_path)
    config = json.loads((saved / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert "want at most 100" in failure(capsys, tmp_path, "--port", 0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": BASE + 256}))
    (tmp_path / "tiktoken.model").write_text("IQ== 0")
    assert "tiktoken.model: got no token for" in failure(capsys, tmp_path, "--port", 0)
    monkeypatch.delitem(sys.modules, "kimi_linear.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'kimi-linear[serve]'" in failure(capsys, saved, "--port", 0)
