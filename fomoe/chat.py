"""Chat messages -> the text a model was trained on, by the Jinja template in its file.

Owns: finding and rendering the template, in a sandbox, since it is a program from a stranger.
Does not know: ids, HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fomoe.errors import RequestError
from fomoe.gguf import GgufFile
from fomoe.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template. Made by `ChatTemplate.from_gguf`."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template cannot be read: {error}") from None

    @classmethod
    def from_gguf(
        cls, gguf: GgufFile, name: str | None = None, *, tokenizer: Tokenizer | None = None
    ) -> ChatTemplate:
        """The template of a model: the one called `name`, or the default one.

        A model that has none but knows ChatML's tokens gets ChatML, as in llama.cpp; one that does
        not know them was never trained to chat, which is a RequestError. A `tokenizer` at hand
        saves reading the vocabulary again.
        """
        key = "tokenizer.chat_template" + (f".{name}" if name else "")
        source = gguf.value(key, str, None)
        if source is None and name is not None:
            prefix = "tokenizer.chat_template."
            known = [k.removeprefix(prefix) for k in gguf.metadata if k.startswith(prefix)]
            raise RequestError(
                f"{gguf.paths[0]}: no chat template {name!r}; there are: {', '.join(known) or '-'}"
            )
        tokenizer = tokenizer or Tokenizer.from_gguf(gguf)
        if source is None:
            if None in (tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")):
                raise RequestError(
                    f"{gguf.paths[0]}: the model has no chat template: it was not made for chat; "
                    "give it a prompt to continue instead"
                )
            source = CHATML
        bos, eos = (
            "" if id_ is None else tokenizer.token_text(id_)
            for id_ in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos_token=bos, eos_token=eos)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`, each with a "role" and usually a "content".

        `add_generation_prompt` ends it where the assistant's answer begins; `kwargs` are the
        template's own options, e.g. enable_thinking. Raises RequestError for messages that the
        template refuses.
        """
        if not messages:
            raise RequestError("a chat needs at least one message")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"message {i} is not an object with a role")
        variables = {
            "messages": [_with_arguments(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            **self._tokens,
            **kwargs,
        }
        try:
            return self._template.render(variables)
        # The template is a program: what it does wrong, or makes of odd messages, can be anything.
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None


class _Arguments(dict[str, Any]):
    """A tool call's arguments: a mapping, which some templates need, that prints as JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def _with_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as mappings: OpenAI's API has JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call) for call in calls]}


def _call_with_arguments(call: object) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    if not isinstance(arguments, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _Arguments(arguments)}}


class _Generation(Extension):
    """{% generation %}: marks what training computes its loss on; here its content is just text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
