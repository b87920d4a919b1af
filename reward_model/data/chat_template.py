# SPDX-License-Identifier: Apache-2.0
"""The chat template of a tokenizer, as it is trained with and saved: it ends where a score is read, on any day."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.data.rendering import TemplateTooSlow, render

BUILT_IN = {
    # Anthropic's marks, which upstream trains on; closed with the end token, as our texts are
    "human_assistant": (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content }}"
        "{% if loop.last and not continue_final_message %}{{ eos_token }}{% endif %}"
        "{% elif message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    )
}
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CLOSE = "{{%- set text %}}{}{{% endset -%}}{{{{ text if add_generation_prompt else text.rstrip() }}}}"
NOW = re.compile(r"strftime_now\(\s*(['\"])(?P<format>.*?)\1\s*\)")
Template = str | dict[str, str]


def give_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Take a chat template from a file, or one of ours by its name.

    Raises:
        UserError: no such file, or none of ours.
    """
    if name_or_path in BUILT_IN:
        if tokenizer.eos_token is None:
            raise UserError(f"--chat_template {name_or_path}: the tokenizer has no end token to close a chat with")
        tokenizer.chat_template = BUILT_IN[name_or_path]
        return
    try:
        tokenizer.chat_template = Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        ours = ", ".join(BUILT_IN)
        raise UserError(f"--chat_template {name_or_path}: no such file, and ours are called {ours}") from error


def settle_template(tokenizer: PreTrainedTokenizerBase, today: datetime.datetime, is_trained: bool = False) -> None:
    """Rewrite a template that ends a chat with white space after its closing token, or that writes the date.

    A score is read at the last token of what the template gives. A line break after the token that closes a turn is a
    place that nothing is trained on. And a date would have the saved model score otherwise tomorrow. What is rewritten
    is said in a line, and is saved with the tokenizer.

    Args:
        today: the date that is written from now on.
        is_trained: the model is a reward model already, whose scores are read where its own template ends.
    """
    template = tokenizer.chat_template
    if not template:
        return
    tokenizer.chat_template = _map(template, lambda each: _dated(each, today))
    if _writes_date(tokenizer.chat_template):
        logger.warning("the chat template writes the date in a way that cannot be fixed: scores will depend on the day")
    elif tokenizer.chat_template != template:
        logger.info(f"chat template: the date that it writes stays {today:%Y-%m-%d}, also in what is saved")
    closing = _closed_before_space(tokenizer)
    if closing and is_trained:
        logger.info(f"chat template: kept as the reward model came with it, with white space after {closing}")
    elif closing:
        before = tokenizer.chat_template
        tokenizer.chat_template = _map(before, _closed)
        if _is_closed(tokenizer, before):
            logger.info(f"chat template: ends at {closing}, without the white space after it, also in what is saved")
        else:
            tokenizer.chat_template = before
            logger.warning(f"chat template: white space follows {closing}, and scores are read there")


def _map(template: Template, change) -> Template:
    """Some tokenizers have several templates, each with a name."""
    if isinstance(template, dict):
        return {name: change(each) for name, each in template.items()}
    return change(template)


def _dated(template: str, today: datetime.datetime) -> str:
    """A template whose ``strftime_now`` is a macro that knows the formats the template asks for."""
    formats = {found["format"] for found in NOW.finditer(template)}
    if not formats or template.count("strftime_now(") > len(NOW.findall(template)):
        return template
    known = ", ".join(f"{name!r}: {today.strftime(name)!r}" for name in sorted(formats))
    return f"{{%- macro strftime_now(format) -%}}{{{{ {{{known}}}[format] }}}}{{%- endmacro -%}}" + template


def _writes_date(template: Template) -> bool:
    texts = template.values() if isinstance(template, dict) else [template]
    return any("strftime_now(" in text and "macro strftime_now(" not in text for text in texts)


def _closed(template: str) -> str:
    # of a line break after a block Jinja, as Transformers sets it up, keeps nothing: one more keeps the template's own
    return CLOSE.format("\n" + template if template.startswith("\n") else template)


def _rendered(tokenizer, **options) -> str:
    return render(tokenizer, PROBE, **options)


def _closed_before_space(tokenizer) -> str | None:
    """The special token that closes a chat, if the template writes white space after it."""
    try:
        text = _rendered(tokenizer)
    except TemplateTooSlow as error:
        advice = "--chat_template gives another"
        raise UserError(f"the tokenizer's chat template does not end: {error}; {advice}") from error
    except Exception:  # a template that refuses these two turns is left as it is; rows will say why
        return None
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    stripped = text.rstrip()
    closing = [token for token in special if token and stripped.endswith(token)]
    return max(closing, key=len) if closing and stripped != text else None


def _is_closed(tokenizer, before: Template) -> bool:
    """Whether the rewritten template gives what the one before it gave, without the white space."""
    after = tokenizer.chat_template
    try:
        closed, opened = _rendered(tokenizer), _rendered(tokenizer, add_generation_prompt=True)
        tokenizer.chat_template = before
        return closed == _rendered(tokenizer).rstrip() and opened == _rendered(tokenizer, add_generation_prompt=True)
    except Exception:
        return False
    finally:
        tokenizer.chat_template = after
