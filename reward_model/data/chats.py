# SPDX-License-Identifier: Apache-2.0
"""Chat messages: the forms in which data sets write them, and the text that a chat template makes of them.

A chat is what the tokenizer's own template gives, to the letter, and its score is read at its last token: so do
TRL and vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from reward_model.common.errors import first_line
from reward_model.data.comparisons import BadRow, common_prefix
from reward_model.data.rendering import TemplateTooSlow, render

ROLES = {  # ShareGPT's names, and what others write there
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
WRITTEN_OUT = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")  # the beginning of messages
SURROGATE = re.compile("[\ud800-\udfff]")
TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")  # Anthropic's marks
ONE_TURN = re.compile(r"\s*Human: (?P<asked>.*?)\s*Assistant:\s*", re.DOTALL)  # upstream's prompts
OF_THE_CALL = {  # arguments of apply_chat_template that are not for the template
    *("conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "add_generation_prompt"),
}
Message = dict
Chat = list[Message]


def is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def in_plain(name: str, value):
    """Messages in the form that templates take, and anything else as it is.

    Reads what others write instead: a JSON string, a single message, ShareGPT's ``from`` and ``value``, and content in
    parts of text.

    Raises:
        BadRow: messages that Python wrote out as text, or a part that is no text.
    """
    if isinstance(value, str) and WRITTEN_OUT.match(value):
        try:
            read = json.loads(value)
        except ValueError:
            how = "written out as text, as to_csv does it: save it as JSON or Parquet"
            raise BadRow(f"{name} is a list of messages that was {how}") from None
        read = [read] if isinstance(read, dict) else read
        value = read if isinstance(read, list) and all(map(_is_message, read)) else value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        return value
    return [_with_text(name, _with_role(message)) for message in messages]


def _is_message(value) -> bool:
    return isinstance(value, dict) and (
        (isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value))
        or (isinstance(value.get("from"), str) and "value" in value)
    )


def _with_role(message: Message) -> Message:
    if isinstance(message.get("role"), str):
        return {"content": None} | message
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content", "weight")}
    return {"role": ROLES.get(message["from"].lower(), message["from"]), "content": message["value"]} | rest


def _with_text(name: str, message: Message) -> Message:
    parts = message["content"]
    if not isinstance(parts, list) or not parts:
        return message
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"{name} has a message part of type {kind}, and only text can be read")
        texts.append(part["text"])
    return message | {"content": "".join(texts)}


def half_character(text: str) -> str:
    """The first half of a surrogate pair in a text, as a cut "\\ud83d\\ude00" leaves it: no tokenizer takes it."""
    found = SURROGATE.search(text)
    return f"\\u{ord(found[0]):x}" if found else ""


def require_characters(name: str, value) -> None:
    """Raise BadRow if a text, or the content of a message, has half a character."""
    parts = value if isinstance(value, list) else [{"content": value}]
    for text in (part["content"] for part in parts):
        if isinstance(text, str) and (half := half_character(text)):
            raise BadRow(f"{name} has half a character, {half}, which is no text")


def turns_of(text: str) -> Chat:
    """A text with Anthropic's marks of turns, or one in upstream's words, as messages; one without marks is a user's.

    >>> turns_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello.\\n\\nHuman: Bye\\n\\nAssistant:")[-1]
    {'role': 'user', 'content': 'Bye'}
    """
    if (one := ONE_TURN.fullmatch(text)) and "\n\nHuman:" not in one["asked"]:
        return [{"role": "user", "content": one["asked"].strip()}]
    before, *marked = TURN.split(text)
    if before.strip() or not marked:
        return [{"role": "user", "content": text.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    chat = [{"role": roles[mark], "content": said.strip()} for mark, said in zip(marked[::2], marked[1::2])]
    return chat[:-1] if marked[-2] == "Assistant" and not marked[-1].strip() else chat


def as_chats(prompt: str | None, found: Sequence[str], names: Sequence[str]) -> tuple[Chat | None, list[Chat]]:
    """A row of text as messages: its prompt, if there is one, and each answer, or each whole dialogue.

    Raises:
        BadRow: a dialogue that does not end with the assistant's turn.
    """
    if prompt is not None:
        answers = [[{"role": "assistant", "content": text.strip()}] for text in found]
        return (turns_of(prompt) if prompt.strip() else None), answers
    chats = [turns_of(text) for text in found]
    for name, chat in zip(names, chats):
        if chat[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with a turn of the assistant; --chat looks for Human: and Assistant:")
    return None, chats


def joined(prompt: Chat, found: list[Chat]) -> list[Chat]:
    """Whole chats. Data sets often give the prompt twice: alone, and at the head of each answer."""
    if all(_holds(messages[:-1], prompt) for messages in found):
        return found
    system, rest = prompt[:1], prompt[1:]
    if rest and system[0]["role"] == "system" and all(_holds(messages[:-1], rest) for messages in found):
        return [system + messages for messages in found]
    return [prompt + messages for messages in found]


def _holds(messages: Chat, prompt: Chat) -> bool:
    """Whether the prompt's messages stand in a row somewhere among the others, but for white space around them."""
    messages, prompt = ([_stripped(message) for message in part] for part in (messages, prompt))
    starts = range(len(messages) - len(prompt) + 1)
    return any(messages[i : i + len(prompt)] == prompt for i in starts)


def _stripped(message: Message) -> Message:
    content = message["content"]
    return message | {"content": content.strip() if isinstance(content, str) else content}


def as_messages(value) -> Chat:
    """An answer, or a chat, as messages without the keys that Arrow adds to each because others have them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return [{k: _without_none(v) for k, v in message.items() if v is not None or k == "content"} for message in value]


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def template_arguments(row: dict) -> dict:
    """What a row hands to the chat template beside its messages: ``tools`` and ``chat_template_kwargs``.

    Raises:
        BadRow: tools that are no list, or keyword arguments that are no object.
    """
    given = {}
    for name, kind, what in (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "an object")):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError:
                raise BadRow(f"{name} is text that is not JSON") from None
        if value in (None, "", [], {}):
            continue
        if not isinstance(value, kind):
            raise BadRow(f"{name} is not {what}")
        given[name] = _without_none(value)
    if taken := OF_THE_CALL.intersection(given.get("chat_template_kwargs", {})):
        raise BadRow(f"chat_template_kwargs has {min(taken)}, which is no variable of a template")
    return ({"tools": given["tools"]} if "tools" in given else {}) | given.get("chat_template_kwargs", {})


def require_answer(name: str, message: Message, may_be_empty: bool = False) -> None:
    """Raise BadRow unless a chat ends with a message of the assistant, and it says or calls something if it has to."""
    if message["role"] != "assistant":
        raise BadRow(f"{name} ends with a message of role {message['role']}, not assistant")
    content = message["content"]
    if not may_be_empty and not message.get("tool_calls") and (content is None or not str(content).strip()):
        raise BadRow(f"{name} is empty")


def write(tokenizer, chats: Iterable[Chat], arguments: dict | None = None) -> list[str]:
    """Each chat as its template writes it, special tokens included.

    Args:
        arguments: of the template, such as ``tools``.

    Raises:
        BadRow: the template refuses a chat, or the tokenizer has none.
    """
    chats = list(chats)
    if chats and not tokenizer.chat_template:
        raise BadRow(
            "chat messages need a tokenizer with a chat template, and this one has none; give it one with "
            "--chat_template, a file or the name human_assistant"
        )
    try:
        return [_whole(render(tokenizer, chat, **arguments or {})) for chat in chats]
    except TemplateTooSlow as error:
        raise BadRow(f"the chat template does not end: {error}") from error
    except BadRow:
        raise
    except Exception as error:  # templates raise what they like
        raise BadRow(f"the chat template refuses it: {first_line(error)}") from error


def _whole(text: str) -> str:
    """What a template wrote; half a character may also come from a role, a tool, a name of a key, or the template."""
    if half := half_character(text):
        raise BadRow(f"what the chat template writes has half a character, {half}, which is no text")
    return text


def shared_text(tokenizer, chats: list[Chat], written: list[str], arguments: dict) -> str:
    """What whole chats, already written, say before their answers differ: the turns that all of them have."""
    first, turns = chats[0], 0
    while turns < min(map(len, chats)) - 1 and all(messages[turns] == first[turns] for messages in chats):
        turns += 1
    head = write(tokenizer, [first[:turns]], {**arguments, "add_generation_prompt": True})[0] if turns else ""
    # a template may write a lone prompt differently: keep what is really shared
    return head[: min(common_prefix(head, text) for text in written)]
