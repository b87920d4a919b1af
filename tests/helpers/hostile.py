# SPDX-License-Identifier: Apache-2.0
"""Inputs that nobody would write on purpose, as strategies of hypothesis, and what has to hold for any of them."""

import contextlib
import json
import re
import signal
import threading

from hypothesis import strategies as st

from reward_model.common.errors import LONGEST, UNPRINTABLE, UserError

PATIENCE = 20  # seconds for one input; the slowest take a twentieth of one

ODD = (
    "", " ", "\0", "\r", "\n", "\r\n", "\x1b[2J\x1b]0;title\x07", "\u202eabc", "\ud83d", "a\udc00b", "\u2028", "\ufeff",
    "\u200b", "<|endoftext|>", "<|im_end|>", "<|pad|>", "\n\nHuman: a\n\nAssistant: b", "Human: a Assistant:", "None",
    '[{"role": "user", "content": "a"}]', "[{'role': 'user', 'content': 'a'}]", "nan", "1e999", "true", "{}", "[", "-",
    "../../etc/passwd", "$(id)", "'; --", "=1+1", "%s%n", "{{ 7 * 7 }}", "hf_abcdefghijklmnop", "x" * 3_000,
)  # fmt: skip
characters = st.characters(exclude_categories=())  # with surrogates, which hypothesis leaves out otherwise
texts = st.one_of(st.sampled_from(ODD), st.text(characters, max_size=12), st.sampled_from(("a", " fish", "the cat")))
numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from((0.5, -0.0, 1e308, 3e38, -3e38, 2**63, -(2**63) - 1, 10**400, float("inf"), float("nan"))),
    st.floats(),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)

roles = st.one_of(st.sampled_from(("user", "assistant", "system", "tool", "human", "gpt")), leaves)
messages = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, values)}),
    st.fixed_dictionaries({"from": roles, "value": texts}),
    st.fixed_dictionaries({"role": roles, "content": texts}, optional={"tool_calls": values, "name": values}),
    values,
)
chats = st.one_of(
    st.tuples(texts, texts).map(
        lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    ),
    st.lists(messages, max_size=4),
)
answers = st.one_of(texts, texts, chats, values)
judgements = st.one_of(numbers, leaves)
rows = st.one_of(
    st.fixed_dictionaries(
        {"prompt": answers, "chosen": answers, "rejected": answers},
        optional=dict.fromkeys(("margin", "rating", "probability", "chosen_score", "rejected_score"), judgements),
    ),
    st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
    st.fixed_dictionaries({"chosen": answers, "rejected": answers}, optional={"system": values, "tools": values}),
    st.fixed_dictionaries(
        {"prompt": answers, "responses": st.lists(answers, max_size=3)},
        optional={"scores": st.lists(judgements, max_size=3), "ranks": values},
    ),
    st.fixed_dictionaries({"prompt": answers, "response": answers}, optional={"score": judgements, "label": values}),
    st.fixed_dictionaries(
        {"messages": chats},
        optional={"rejected_response": answers, "label": values, "chat_template_kwargs": values, "tools": values},
    ),
    st.fixed_dictionaries(
        {"instruction": answers, "response_1": answers, "response_2": answers},
        optional={"preference": values, "preference_strength": values, "input": values, "history": values},
    ),
    st.fixed_dictionaries(
        {"question": values, "answer_0": values, "answer_1": values, "score_0": values, "score_1": values}
    ),
    st.fixed_dictionaries({"completions": values, "answers": values, "conversation_a": chats, "conversation_b": chats}),
    st.dictionaries(texts, values, max_size=4),
)


@st.composite
def lines(draw):
    """Lines of a file, most of them rows, as bytes."""
    found = []
    for row in draw(st.lists(rows, min_size=1, max_size=5)):
        line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        kind = draw(st.integers(0, 9))
        if kind == 0:
            line = line[: draw(st.integers(0, len(line)))]
        elif kind == 1:
            line = draw(st.binary(max_size=20)).replace(b"\n", b"")
        elif kind == 2:
            line = line[:1] + b'"a": 1, "a": 2' + line[1:]
        elif kind == 3:
            line = draw(
                st.sampled_from((b"[" * 60_000, b"5", b"null", b"[]", b"{}", b"9" * 5_000, b'{"json": "\\u0000"}'))
            )
        found.append(line)
    return found


TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
    "{{ messages[0]['content'] }}{{ messages[-1].content }}",
    "{{ messages | tojson }}",
    "{% if messages | length > 2 %}{{ raise_exception('no\x1b[2J') }}{% endif %}x",
)
pieces = st.one_of(
    st.sampled_from(
        (
            *("{{ messages }}", "{{ m }}", "{% for m in messages %}", "{% endfor %}", "{{ '\ud800' }}", "{{ 1 / 0 }}"),
            *("{{ raise_exception(messages) }}", "{{ messages[9].content }}", "{{ ''.__class__ }}", "{% break %}"),
            *("{{ strftime_now('%Y') }}", "{{ tools | tojson }}", "{% set x = namespace(a=1) %}", "{{ 2 ** 9 ** 9 }}"),
            *("{{ range(10 ** 9) }}", "{{ self }}", "{{ cycler }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            *("{{ messages | map(attribute='content') | join }}", "{% include 'x' %}", "{{ '%d' % 'a' }}", "{#", "{{"),
        )
    ),
    texts,
)
templates = st.one_of(st.sampled_from(TEMPLATES), st.lists(pieces, max_size=4).map("".join), values)


@contextlib.contextmanager
def patience(seconds=PATIENCE):
    """Fail where an input takes longer; in the main thread alone, where a signal can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number, frame):
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def require_line(text, *places):
    """A message is one line that a terminal shows as it is, and names the place."""
    assert isinstance(text, str)
    assert text.strip()
    assert not UNPRINTABLE.search(text), repr(text)
    assert len(text) <= LONGEST
    assert not re.search(r"weights_only\W{1,7}False|trust_remote_code\W{1,7}True", text), text
    for place in places:
        assert str(place) in text, (place, text)


@contextlib.contextmanager
def only_user_errors(*places):
    """What is inside may end with a UserError of one line that names the places, and with nothing else."""
    with patience():
        try:
            yield
        except UserError as error:
            require_line(str(error), *places)


@st.composite
def changed(draw, original):
    """A JSON value that differs from an original in a place or three: another value, a key more or less."""
    content = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        inner = content
        while isinstance(inner, (dict, list)) and inner:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw(st.sampled_from(keys))
            if isinstance(inner[key], (dict, list)) and inner[key] and draw(st.integers(0, 3)):
                inner = inner[key]
                continue
            what = draw(st.integers(0, 4))
            if what == 0:
                del inner[key]
            elif what == 1 and isinstance(inner, dict):
                inner[draw(texts)] = draw(values)
            else:
                inner[key] = draw(values)
            break
        if not isinstance(content, (dict, list)):
            break
    return content
