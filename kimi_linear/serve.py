"""`kimi-linear serve`: transformers' OpenAI-compatible server around one model.

The server is put together here from the parts of `transformers serve`. That command finds a model
by the name of its class in transformers, which is also that of transformers' own Kimi Linear. Only
the plain generation path is on: continuous batching keeps pages of keys and values, which KDA
layers do not have.
"""

import copy
import inspect
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState

from kimi_linear.cli import check_sampling
from kimi_linear.tokenization_kimi_linear import KimiLinearTokenizer
from kimi_linear.tool_calls import RESPONSE_TEMPLATE, check_messages

# Fields that the server would ignore though they change the answer, and values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),  # the server would put it behind the text
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "web_search_options": (),
}


class OneModel(ModelManager):
    """What the server asks for models: it has one, already loaded."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.force_model = model, tokenizer, name
        self.created = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[[dict[str, Any]], None] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> Any:
        """The model and its tokenizer, under whatever name they are asked for."""
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": self.force_model, "cached": True})
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        entry = {"id": self.force_model, "object": "model", "created": self.created}
        return [entry | {"owned_by": "kimi-linear"}]


class CheckedHandler(BaseHandler):
    """Bad and unsupported fields are a ValueError; the server itself ignores most of them."""

    model_manager: OneModel

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for name, neutral in UNSUPPORTED.items():
            value = body.get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name}: got {value!r}, which this server does not support")
        stop = body.get("stop")
        stops = stop if isinstance(stop, list) else [stop]
        if stop is not None and not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop: got {stop!r}, want a string or a list of them, none empty")
        size = self.model_manager.model.config.vocab_size
        bias = body.get("logit_bias") or {}
        if not isinstance(bias, dict):
            raise ValueError(f"logit_bias: got {bias!r}, want an object")
        for key in bias:
            if not (key.isdecimal() and int(key) < size):
                raise ValueError(f"logit_bias: got the token {key!r}, want 0 to {size - 1}")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """As the server's, but `generation_config` changes the model's, and does not replace it."""
        fields = {k: v for k, v in body.items() if k != "generation_config"}
        if fields.get("max_completion_tokens") is not None:  # transformers 5.17 ignores it
            fields["max_tokens"] = fields["max_completion_tokens"]
        config = super()._build_generation_config(fields, model_generation_config, use_cb)
        if (bias := fields.get("logit_bias")) is not None:
            config.sequence_bias = {(int(k),): float(x) for k, x in bias.items()} or None
        if fields.get("temperature") is not None:
            config.do_sample = config.temperature > 0
        given = body.get("generation_config") or {}
        given = json.loads(given) if isinstance(given, str) else given
        if not isinstance(given, dict) or (given := config.update(**given)):
            raise ValueError(f"generation_config: got {given!r}, want fields of GenerationConfig")
        check_sampling(config)
        return config


class ChatHandler(CheckedHandler, ChatCompletionHandler):
    """The server's chat completions; the messages get to the chat template as they came."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        check_messages(body.get("messages"))
        tools = body.get("tools") or []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(f"tools: got {tools!r}, want a list of objects")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
        return messages


class TextHandler(CheckedHandler, CompletionHandler):
    """The server's text completions."""


class NotServed:
    """In the place of the server's other handlers."""

    async def handle_request(self, *_: Any) -> None:
        raise HTTPException(404, "kimi-linear serves /v1/chat/completions and /v1/completions")


def build_app(model: Any, tokenizer: Any, name: str) -> FastAPI:
    """The server's application.

    Args:
        model: a `KimiLinearForCausalLM`. What a request leaves open comes from its
            `generation_config`, and where that says nothing, from sampling at temperature 1.
        tokenizer: its tokenizer. Chat completions need a chat template.
        name: the id of the model in requests and answers.
    """
    defaults = model.generation_config
    if defaults.do_sample is None:
        defaults.do_sample = True
    if defaults.top_k is None:
        defaults.top_k = 0  # transformers would take 50
    if stop_ids := getattr(tokenizer, "stop_ids", None):
        defaults.eos_token_id = stop_ids
    if isinstance(tokenizer, KimiLinearTokenizer):
        # The arguments of a call as the model wrote them, which also serves those that are no JSON.
        tokenizer.response_template = template = copy.deepcopy(RESPONSE_TEMPLATE)
        template["fields"]["tool_calls"]["content"] = "text"
    manager, state = OneModel(model, tokenizer, name), GenerationState()
    parameters = inspect.signature(build_server).parameters  # 5.23 has one more than 5.17
    handlers: dict[str, Any] = {p: NotServed() for p in parameters if p.endswith("_handler")}
    handlers["chat_handler"] = ChatHandler(manager, state)
    handlers["completion_handler"] = TextHandler(manager, state)
    app = build_server(manager, generation_state=state, **handlers)

    def answer(status: int, message: Any) -> JSONResponse:
        body = {"message": message, "type": "invalid_request_error"}
        return JSONResponse({"error": body}, status_code=status)

    @app.exception_handler(ValueError)
    async def bad_request(_: Request, error: ValueError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, error.detail)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        ValueError: the address is not one of this machine, or is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}") from None


def serve(app: FastAPI, address: socket.socket) -> None:
    """Answer requests until interrupted."""
    uvicorn.Server(uvicorn.Config(app)).run(sockets=[address])
