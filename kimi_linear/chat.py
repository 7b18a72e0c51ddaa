"""A conversation with a model, turn by turn, that runs only the tokens that are new in a turn."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from kimi_linear.cache import KimiLinearCache, Snapshot
from kimi_linear.tokenization_kimi_linear import KimiLinearTokenizer
from kimi_linear.tool_calls import parse_tool_calls


class Chat:
    """A conversation and the cache of what the model has read of it.

    Every turn writes the whole conversation with the chat template; the tokens that the cache holds
    are not run again, so that an answer is that of a run over all of them. If earlier tokens come
    out differently (an answer that is not how the tokenizer splits its own text, a template that
    rewrites old answers), the cache goes back to the last user message before that answer, or where
    that does not help, starts anew.

    Args:
        model: a `KimiLinearForCausalLM`.
        tokenizer: its tokenizer; an answer ends at `stop_ids`.
        system: the system prompt, if any.
        options: of `model.generate`: sampling, `max_new_tokens`.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: KimiLinearTokenizer,
        system: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        size = model.config.vocab_size
        if len(tokenizer) > size:
            raise ValueError(f"tokenizer: got {len(tokenizer)} tokens, want at most {size}")
        self.model, self.tokenizer, self.options = model, tokenizer, options or {}
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.cache = KimiLinearCache.configured(model.config, model.generation_config)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation but for the system prompt."""
        self.messages: list[dict[str, Any]] = list(self.system)
        self._forget()

    def _forget(self) -> None:
        self.cache.reset()
        self.tokens: list[int] = []  # those in the cache
        self.snapshot: Snapshot | None = None  # of the cache when it held fewer of them

    def reply(self, text: str, streamer: BaseStreamer | None = None) -> str:
        """The answer to a user's message; `streamer` gets its tokens as they come.

        After an exception, an interrupt as well, the conversation is as it was before the message.
        """
        self.messages.append({"role": "user", "content": text})
        before = self.tokens, self.snapshot
        try:
            answer = self._generate(streamer)
        except BaseException:
            self.messages.pop()
            self.tokens, self.snapshot = before
            self._go_back(len(self.tokens))
            raise
        answer_text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        message: dict[str, Any] = {"role": "assistant", "content": answer_text}
        try:
            message["content"], calls = parse_tool_calls(answer_text)
            message |= {"tool_calls": calls} if calls else {}
        except ValueError:  # malformed calls are plain text
            message["content"] = answer_text
        self.messages.append(message)
        return answer_text

    def _generate(self, streamer: BaseStreamer | None) -> list[int]:
        ids = self._render(add_generation_prompt=True)
        common = common_length(self.tokens, ids)
        if common < len(self.tokens) or common == len(ids):
            self._go_back(min(common, len(ids) - 1))
        # The snapshot is before what opens an answer: a template may write that otherwise later.
        end = min(common_length(self._render(add_generation_prompt=False), ids), len(ids) - 1)
        row = torch.tensor([ids], device=self.model.device)
        if end > len(self.tokens):
            with torch.no_grad():
                new = row[:, len(self.tokens) : end]
                self.model(new, past_key_values=self.cache, logits_to_keep=1)
            self.tokens, self.snapshot = ids[:end], self.cache.snapshot()
        out = self.model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            past_key_values=self.cache,
            eos_token_id=self.tokenizer.stop_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **self.options,
        )[0].tolist()
        self.tokens = out[: self.cache.get_seq_length()]  # the last one has not been run
        return out[len(ids) :]

    def _render(self, add_generation_prompt: bool) -> list[int]:
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=add_generation_prompt
        )["input_ids"]

    def _go_back(self, length: int) -> None:
        """Make the cache hold at most the first `length` of its tokens, and as many as it can."""
        if self.snapshot is None or self.snapshot.seen > length:
            self._forget()
        else:
            self.cache.restore(self.snapshot)
            self.tokens = self.tokens[: self.snapshot.seen]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
