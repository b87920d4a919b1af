# SPDX-License-Identifier: Apache-2.0
"""Chats: the forms they come in, and the template that writes them, as it is trained with and saved."""

import datetime
import json

import pytest
import tiny
from transformers import AutoTokenizer

from reward_model.common.errors import UserError
from reward_model.data.chat_template import BUILT_IN, give_template, settle_template
from reward_model.data.chats import as_chats, in_plain, turns_of
from reward_model.data.comparisons import BadRow
from reward_model.data.rows import read_row

TODAY = datetime.datetime(2026, 11, 26)
USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
HEY = {"role": "assistant", "content": "Hey"}
LLAMA3 = (  # closes without white space
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": tiny.CHATML,
    "leading line break": "\n" + tiny.CHATML,
    "trimmed blocks": tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>{{'\n'}}")
    .replace("{%", "{%-")
    .replace("%}", "-%}"),
    "macro and namespace": (
        "{%- macro turn(m) -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endmacro -%}"
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{% set ns.n = ns.n + 1 %}{{ turn(m) }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    ),
}  # fmt: skip


def settled(template, is_trained=False, **special):
    tokenizer = tiny.chatml(chat_template=template, **special)
    settle_template(tokenizer, TODAY, is_trained)
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_ends_at_the_token_that_closes_it(name, tmp_path, capsys):
    before, after = tiny.chatml(chat_template=TEMPLATES[name]), settled(TEMPLATES[name])
    assert "chat template: ends at <|im_end|>, without the white space after it" in capsys.readouterr().out
    after.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for chat in ([USER, HELLO], [USER, HELLO, USER, HEY], [USER]):
        given = before.apply_chat_template(chat, tokenize=False)
        for tokenizer in (after, loaded):
            assert tokenizer.apply_chat_template(chat, tokenize=False) == given.rstrip()
            opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert opened == before.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    unfinished = [after.apply_chat_template([USER, HELLO], tokenize=False, continue_final_message=True)]
    unfinished += [before.apply_chat_template([USER, HELLO], tokenize=False, continue_final_message=True)]
    assert unfinished[0] == unfinished[1]


@pytest.mark.parametrize("template", [LLAMA3, "{% for m in messages %}{{ m.content }}\n{% endfor %}"])
def test_a_template_that_ends_where_it_closes_or_closes_with_nothing_is_left(template, capsys):
    assert settled(template).chat_template == template
    assert capsys.readouterr().out == ""


def test_a_reward_model_keeps_the_template_it_came_with(capsys):
    assert settled(tiny.CHATML, is_trained=True).chat_template == tiny.CHATML
    assert "kept as the reward model came with it, with white space after <|im_end|>" in capsys.readouterr().out


def test_settled_twice_is_settled_once():
    once = settled(tiny.CHATML).chat_template
    assert settled(once).chat_template == once


def test_several_templates_are_all_rewritten():
    tokenizer = settled({"default": tiny.CHATML, "tool_use": tiny.CHATML + "{{ tools | length }}"})
    assert tokenizer.apply_chat_template([USER, HELLO], tokenize=False).endswith("Hello<|im_end|>")
    assert tokenizer.apply_chat_template([USER, HELLO], tokenize=False, tools=[{"a": 1}]).endswith("<|im_end|>\n1")


DATES = {
    "Llama 3.2": "{%- if strftime_now is defined %}{%- set d = strftime_now('%d %b %Y') %}{%- else %}{%- set d = 'x' %}"
    "{%- endif %}{{ d }}: ",
    "two formats": '{{ strftime_now("%Y") }} {{ strftime_now("%B %d") }}: ',
}


@pytest.mark.parametrize("name", DATES)
def test_the_date_is_that_of_the_training(name, tmp_path, monkeypatch, capsys):
    tokenizer = settled(DATES[name] + tiny.CHATML)
    expected = {"Llama 3.2": "26 Nov 2026: ", "two formats": "2026 November 26: "}[name]
    assert "the date that it writes stays 2026-11-26" in capsys.readouterr().out
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.apply_chat_template([USER, HELLO], tokenize=False).startswith(expected)


def test_a_date_that_cannot_be_fixed_is_said(capsys):
    settled("{% set f = '%Y' %}{{ strftime_now(f) }}" + tiny.CHATML)
    assert "scores will depend on the day" in capsys.readouterr().out


def test_template_from_a_file_or_by_name(tmp_path):
    (tmp_path / "own.jinja").write_text(LLAMA3)
    tokenizer = tiny.tokenizer()
    give_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == LLAMA3
    give_template(tokenizer, "human_assistant")
    chat = [USER, HELLO, USER, HEY]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant: Hey<|endoftext|>"
    )
    opened = tokenizer.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True)
    assert opened == "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant:"
    for wrong in ("human", str(tmp_path / "none.jinja")):
        with pytest.raises(UserError, match="no such file, and ours are called human_assistant"):
            give_template(tokenizer, wrong)
    with pytest.raises(UserError, match="the tokenizer has no end token"):
        give_template(tiny.tokenizer(eos_token=None), "human_assistant")
    assert list(BUILT_IN) == ["human_assistant"]


# Turns in text.


def test_human_and_assistant_become_messages():
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\nYes.\n\nHuman: Bye\n\nAssistant: See you"
    roles = ["user", "assistant", "user", "assistant"]
    assert turns_of(text) == [
        {"role": role, "content": content} for role, content in zip(roles, ["Hi", "Hello.\nYes.", "Bye", "See you"])
    ]
    assert turns_of(" Human: What is it? Assistant:") == [{"role": "user", "content": "What is it?"}]
    assert turns_of("What does Human: mean?") == [{"role": "user", "content": "What does Human: mean?"}]
    prompt, answers = as_chats("\n\nHuman: Hi\n\nAssistant:", [" a", " b"], ("chosen", "rejected"))
    assert prompt == [USER]
    assert answers == [[{"role": "assistant", "content": text}] for text in "ab"]
    with pytest.raises(BadRow, match="rejected does not end with a turn of the assistant"):
        as_chats(None, ["\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Hi"], ("chosen", "rejected"))


@pytest.mark.parametrize("row", [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Hey"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Hey"},
    {"prompt": " Human: Hi Assistant:", "chosen": " Hello", "rejected": " Hey"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Hey"},
])  # fmt: skip
def test_text_through_the_template(row):
    tokenizer = settled(tiny.CHATML)
    wanted = read_row({"prompt": [USER], "chosen": [HELLO], "rejected": [HEY]}, tokenizer)
    found = read_row(row, tokenizer, chat=True)
    assert (found.prompt, found.whole, found.templated) == (wanted.prompt, wanted.whole, True)
    assert not read_row(row, tokenizer).templated


def test_without_a_template_the_way_out_is_named():
    row = {"chosen": [USER, HELLO], "rejected": [USER, HEY]}
    with pytest.raises(BadRow, match="this one has none; give it one with --chat_template, a file or the name human"):
        read_row(row, tiny.tokenizer())


# Tools.

CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "look", "arguments": {"at": "cat", "with": None}}}]}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": None}}]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if loud %}LOUD{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("form", [lambda value: value, json.dumps])
def test_tools_and_template_arguments_reach_the_template(form):
    row = {"prompt": [USER], "chosen": [CALL], "rejected": [HEY], "tools": form(TOOLS)}
    texts = read_row(row | {"chat_template_kwargs": form({"loud": True})}, settled(WITH_TOOLS))
    start = '[{"type": "function", "function": {"name": "look"}}]LOUD<|im_start|>user\nHi<|im_end|>\n'
    assert texts.whole == [
        start + '<|im_start|>assistant\n{"name": "look", "arguments": {"at": "cat"}}<|im_end|>',
        start + "<|im_start|>assistant\nHey<|im_end|>",
    ]


@pytest.mark.parametrize("change, reason", [
    ({"tools": {"name": "look"}}, "tools is not a list of tools"),
    ({"tools": "look"}, "tools is text that is not JSON"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    ({"chosen": [{**CALL, "tool_calls": []}]}, "chosen is empty"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": TOOLS}, "tools go through a chat template, and the row"),
])  # fmt: skip
def test_tools_that_cannot_be_used(change, reason):
    with pytest.raises(BadRow, match=reason):
        read_row({"prompt": [USER], "chosen": [CALL], "rejected": [HEY], **change}, settled(WITH_TOOLS))


def test_messages_in_other_forms():
    wanted = [USER, {**HELLO, "weight": None}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": None}]
    assert in_plain("x", shared) == [USER, HELLO]
    assert in_plain("x", json.dumps(shared)) == [USER, HELLO]
    assert in_plain("x", wanted) == wanted
    assert in_plain("x", HELLO) == [HELLO]
    assert in_plain("x", {"from": "function_call", "value": "f()"}) == [{"role": "assistant", "content": "f()"}]
    assert in_plain("x", {"role": "assistant", "tool_calls": [1]}) == [{"content": None, "role": "assistant",
                                                                      "tool_calls": [1]}]  # fmt: skip
    for other in ("text", ["text"], [], {}, None, [{"text": "x"}]):
        assert in_plain("x", other) == other
