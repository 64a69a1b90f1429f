"""Rendering chat templates: the same text as transformers makes, and clear refusals."""

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from fomoe.chat import CHATML, ChatTemplate
from fomoe.demo import DEMO_MODEL
from fomoe.errors import RequestError
from fomoe.gguf import GgufFile

# Written to use what large models' templates use: macros, namespaces, loop controls, tests.
RICH = """
{%- macro show(value) %}{% if value is string %}{{ value }}{% elif value is mapping %}
{{- value | tojson }}{% else %}{{ value | tojson(indent=2) }}{% endif %}{% endmacro -%}
{%- set ns = namespace(last='', count=0) %}
{%- if tools %}TOOLS {% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('role ' + message.role + ' is not allowed') }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- bos_token + '<|' + message.role + '|>' + show(message.content).strip() }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name }}(
        {%- for key, value in call.function.arguments | items %}{{ key }}={{ show(value) }},
        {%- endfor %})
    {%- endfor %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ eos_token }}{% endgeneration %}
    {%- endif %}
    {%- if not loop.last %}

    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think></think>' }}{% endif %}{% endif %}
"""

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "skip", "content": "?"},
    {"role": "user", "content": "Grüß dich 🙂"},
    {
        "role": "assistant",
        "content": {"a": [1, None]},
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1", "y": [2.5, "ü"]}}}],
    },
    {"role": "user", "content": ["one", "two"]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does <it>"}}]


def write(path: Path, tokens: list[str], **strings: str) -> GgufFile:
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1, *[3] * (len(tokens) - 1)])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in strings.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile.open(path)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    want, _ = render_jinja_template(
        [MESSAGES],
        tools=TOOLS,
        chat_template=RICH,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
        enable_thinking=False,
    )
    got = ChatTemplate(RICH, bos_token="<s>", eos_token="</s>").render(
        MESSAGES, tools=TOOLS, add_generation_prompt=add_generation_prompt, enable_thinking=False
    )
    assert got == want[0]
    assert "Grüß dich 🙂" in got


def test_arguments_given_as_json_text() -> None:
    """OpenAI's API has JSON text where some templates walk a mapping and others print it."""
    template = ChatTemplate(
        "{% for c in messages[0].tool_calls %}{% set a = c.function.arguments %}"
        "{% for k, v in a | items %}{{ k }}={{ v }};{% endfor %}{{ a }}{{ 'x' + a + 'y' }}"
        "{{ a | tojson }}"
        "{% endfor %}"
    )
    text = '{"a": "ü"}'
    call = {"function": {"name": "f", "arguments": text}}
    got = template.render([{"role": "assistant", "tool_calls": [call]}])
    assert got == f"a=ü;{text}x{text}y{text}"
    assert call["function"]["arguments"] == text  # type: ignore[index]


@pytest.mark.parametrize("arguments", ["not json", "[1]", "3", None])
def test_arguments_that_are_no_mapping_are_left_alone(arguments: str | None) -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}")
    call = {"function": {"name": "f", "arguments": arguments}}
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == str(arguments)


def test_refusals_of_the_template_are_request_errors() -> None:
    with pytest.raises(RequestError, match="role king is not allowed"):
        ChatTemplate(RICH).render([{"role": "king", "content": ""}])
    with pytest.raises(RequestError, match="cannot be read"):
        ChatTemplate("{% for %}")
    with pytest.raises(RequestError, match="refuses these messages"):
        ChatTemplate("{{ messages[0].content + 1 }}").render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].clear() }}",
        "{{ raise_exception.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    template = ChatTemplate(source)
    messages = [{"role": "user", "content": "a"}]
    with contextlib.suppress(RequestError):
        assert "class" not in template.render(messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("messages", [[], ["hello"], [{"content": "no role"}], [{"role": 3}]])
def test_messages_that_are_none(messages: list[Any]) -> None:
    with pytest.raises(RequestError, match="message"):
        ChatTemplate(CHATML).render(messages)


def test_templates_of_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.gguf",
        ["a", "<s>", "</s>"],
        tokenizer__chat_template="{{ bos_token }}default",
        **{"tokenizer__chat_template__tool_use": "{{ eos_token }}tools"},
    )
    message = [{"role": "user", "content": ""}]
    assert ChatTemplate.from_gguf(file).render(message) == "<s>default"
    assert ChatTemplate.from_gguf(file, "tool_use").render(message) == "</s>tools"
    with pytest.raises(RequestError, match=r"no chat template 'rag'; there are: tool_use"):
        ChatTemplate.from_gguf(file, "rag")


def test_model_without_template(tmp_path: Path) -> None:
    file = write(tmp_path / "base.gguf", ["a", "<s>", "</s>"])
    with pytest.raises(RequestError, match="has no chat template"):
        ChatTemplate.from_gguf(file)
    file = write(tmp_path / "chatml.gguf", ["a", "<|im_start|>", "<|im_end|>"])
    got = ChatTemplate.from_gguf(file).render([{"role": "user", "content": "hi"}])
    assert got == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_demo_model_speaks_chatml() -> None:
    template = ChatTemplate.from_gguf(GgufFile.open(DEMO_MODEL))
    assert template.source == CHATML


def test_strftime_now_and_json_options() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }} {{ messages | tojson(sort_keys=true) }}")
    year, _, rest = template.render([{"role": "user", "content": "<ü>"}]).partition(" ")
    assert len(year) == 4
    assert json.loads(rest) == [{"content": "<ü>", "role": "user"}]
    assert "<ü>" in rest
