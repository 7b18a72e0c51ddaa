"""Tool calls as the model writes them, and as OpenAI-style dicts.

An assistant turn that calls tools ends with a section:

    <|tool_calls_section_begin|>
      <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>JSON<|tool_call_end|> ...
    <|tool_calls_section_end|>

without the line breaks. INDEX counts the calls of the conversation from 0. The format is that of
the Kimi K2 family, whose tool tokens the vocabulary has; `chat_template.jinja` writes it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
STOPS = ("<|im_end|>", "[EOS]")
ROLES = ("system", "user", "assistant", "tool")

CALL_ID = re.compile(r"functions\.(?P<name>[^\s:<|>]+):[0-9]+")
MARKER = re.compile(
    "|".join(map(re.escape, (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENTS_BEGIN)))
)
CALL = re.compile(
    rf"\s*{re.escape(CALL_BEGIN)}(?P<id>.*?){re.escape(ARGUMENTS_BEGIN)}(?P<arguments>.*?){re.escape(CALL_END)}",
    re.DOTALL,
)

# The same grammar for `tokenizer.parse_response` and the streaming parser of transformers' server.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_assistant|>assistant<|im_middle|>",
    "fields": {
        "tool_calls": {
            "open_pattern": rf"\s*{re.escape(CALL_BEGIN)}\s*(?P<id>{CALL_ID.pattern})\s*"
            + re.escape(ARGUMENTS_BEGIN),
            "close": CALL_END,
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "id": "{id}",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {
            # Spaces before the end of the section are not content, which they would replace.
            "close_pattern": rf"\s*{re.escape(SECTION_END)}|"
            + "|".join(map(re.escape, (SECTION_BEGIN, *STOPS))),
            "content": "text",
            "content_args": {"strip": False},
            "repeats": True,  # also around malformed calls, which are content
            "join": "",
        },
    },
}


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split generated text into its content and its tool calls.

    Args:
        text: one assistant turn decoded with the tool tokens kept (`skip_special_tokens=True` keeps
            them); the token that ended it may follow.

    Returns:
        What stands before the tool calls, and the calls in order: `{"id": "functions.NAME:INDEX",
        "type": "function", "function": {"name": NAME, "arguments": JSON}}`, JSON being the text of
        an object. Without tool calls, all of the text and `[]`.

    Raises:
        ValueError: a section that is cut off or out of place, an id of another form, arguments that
            are not a JSON object.
    """
    for stop in STOPS:
        text = text.removesuffix(stop)
    content, begin, section = text.partition(SECTION_BEGIN)
    if stray := MARKER.search(content):
        _fail(text, stray.start(), f"{stray[0]} outside of a tool call section")
    if not begin:
        return text, []
    at = len(content) + len(begin)
    section, end, rest = section.partition(SECTION_END)
    if not end:
        _fail(text, at, f"a section without {SECTION_END}; was the text cut off?")
    if rest.strip():
        _fail(text, at + len(section) + len(end), "nothing after the tool calls")

    calls, position = [], 0
    while section[position:].strip():
        match = CALL.match(section, position)
        if match is None:
            _fail(text, at + position, f"{CALL_BEGIN} id {ARGUMENTS_BEGIN} arguments {CALL_END}")
        call_id, arguments = match["id"].strip(), match["arguments"].strip()
        name = CALL_ID.fullmatch(call_id)
        if name is None:
            _fail(text, at + match.start("id"), "an id of the form functions.NAME:INDEX")
        if not isinstance(_json(arguments), dict):
            _fail(text, at + match.start("arguments"), "arguments that are a JSON object")
        function = {"name": name["name"], "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
        position = match.end()
    if not calls:
        _fail(text, at, "at least one tool call in the section")
    return content, calls


def format_tool_calls(calls: Sequence[Mapping[str, Any]], first_index: int = 0) -> str:
    """The text of tool calls, as the chat template writes it: the inverse of `parse_tool_calls`.

    Args:
        calls: OpenAI-style dicts. `arguments` is the JSON text of an object, or the object. An id
            that is not `functions.NAME:INDEX` is replaced by one that is.
        first_index: how many calls the conversation has had before.

    Raises:
        ValueError: a call without name or arguments, or with arguments that are not a JSON object.
    """
    if not calls:
        return ""
    parts = []
    for i, call in enumerate(calls):
        check_tool_call(call, f"calls[{i}]")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        match = CALL_ID.fullmatch(str(call.get("id", "")))
        call_id = (
            match[0] if match and match["name"] == name else f"functions.{name}:{first_index + i}"
        )
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if marker := MARKER.search(arguments):
            raise ValueError(
                f"calls[{i}]: got {marker[0]} in the arguments, which text cannot hold"
            )
        parts.append(CALL_BEGIN + call_id + ARGUMENTS_BEGIN + arguments + CALL_END)
    return SECTION_BEGIN + "".join(parts) + SECTION_END


def check_tool_call(call: Any, where: str) -> None:
    """Raise a ValueError that starts with `where` unless `call` is a complete OpenAI-style call."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}: got {call!r}, want {{'function': {{'name', 'arguments'}}}}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not CALL_ID.fullmatch(f"functions.{name}:0"):
        raise ValueError(
            f"{where}: got the name {name!r}, want one without spaces, ':', '<', '|', '>'"
        )
    parsed = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(parsed, Mapping):
        raise ValueError(
            f"{where}: got the arguments {arguments!r}, want a JSON object or its text"
        )


def check_messages(messages: Any) -> None:
    """Check a conversation before any template sees it.

    Args:
        messages: dicts with `role` (system, user, assistant or tool) and `content` (a string, None,
            or a list of `{"type": "text", "text": str}`); an assistant's may have `tool_calls`, a
            tool's have `tool_call_id`.

    Raises:
        ValueError: anything else, by the index of the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: got {messages!r}, want a list of at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: got {message!r}, want a dict")
        role, content, calls = map(message.get, ("role", "content", "tool_calls"))
        if role not in ROLES:
            raise ValueError(f"{where}: got the role {role!r}, want one of {', '.join(ROLES)}")
        parts = content if isinstance(content, list | tuple) else [{"text": content or ""}]
        for part in parts:
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{where}: got the content {part!r}, want a string or text parts")
        if calls and (role != "assistant" or not isinstance(calls, list | tuple)):
            raise ValueError(
                f"{where}: got tool_calls {calls!r}, want a list, of an assistant only"
            )
        for j, call in enumerate(calls or ()):
            check_tool_call(call, f"{where}.tool_calls[{j}]")
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise ValueError(f"{where}: a tool message needs tool_call_id, the id of its call")


def _json(text: str) -> Any:
    """The value of a JSON text; None where it is not one. NaN and infinities are not JSON."""

    def reject(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=reject)
    except (ValueError, RecursionError):
        return None


def _fail(text: str, at: int, wanted: str) -> NoReturn:
    raise ValueError(f"tool calls: got {text[at : at + 60]!r} at character {at}, want {wanted}")
