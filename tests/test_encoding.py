# SPDX-License-Identifier: Apache-2.0
"""Token ids of prompt and response: of pairs those that the tokenizer itself makes, and which rows stay one text."""

import json
import random
from dataclasses import replace

import pytest
import tiny
import torch
from tokenizers import processors

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.errors import UserError
from reward_model.data.comparisons import Comparison
from reward_model.data.encoding import Encoding, frame_of
from reward_model.data.preprocessing import PreprocessingConfig, tokenize
from reward_model.data.sources import read_sources
from reward_model.data.tokenizer import choose_special_tokens

pytestmark = pytest.mark.usefixtures("own_cache")

PAIR = {"prompt": "what does the cat eat?", "chosen": "fish", "rejected": "the mat"}
WORDS = ["cat", " cat", "the ", "mat", "é", "猫", "\n", " ", "?", "ca", "t", "Hu", "man:", "🐟"]
MAKERS = [tiny.bert, tiny.roberta]


def special_of(tokenizer):
    return choose_special_tokens(tokenizer, len(tokenizer))


def pairs_of(tokenizer):
    return Encoding(tokenizer, special_of(tokenizer), pairs=True)


def rows_of(rows, tmp_path, tokenizer, max_seq_len=64, pairs=True, **changes):
    """Comparisons of a file of these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,), _ = read_sources(str(path), seed=0)
    made = PreprocessingConfig(max_seq_len, "stop", tmp_path / "cache", 1, pairs=pairs, **changes)
    return tokenize(source, tokenizer, special_of(tokenizer), made)


def wholes(row):
    return [[*row.prompt, *response] for response in row.responses]


def random_text(rng, low):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(low, 8)))


def random_rows(seed, count):
    rng, rows = random.Random(seed), []
    for i in range(count):
        prompt, answers = f"a{random_text(rng, 0)}", [f"{random_text(rng, 0)} cat{n}" for n in range(i % 4 + 1)]
        rows.append({"prompt": prompt} | ({"responses": answers} if i % 4 else {"response": answers[0]}))
    return rows


def answers_of(row):
    return row.get("responses") or [row["response"]]


# --- what a tokenizer puts around a pair ---


def test_the_frame_of_a_pair():
    tokenizer = tiny.bert()
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert frame_of(tokenizer) == ([start], [end], [end], True)
    tokenizer = tiny.roberta()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert frame_of(tokenizer) == ([start], [end, end], [end], False)


def with_pairs(template, **changes):
    return tiny.bert(pair=template, **changes)


@pytest.mark.parametrize(
    "make",
    [
        tiny.tokenizer,  # nothing around a text
        tiny.llama,  # a start token, and none between two texts
        lambda: with_pairs("[CLS]:2 $A:0 [SEP]:0 $B:1 [SEP]:1"),  # Funnel's segment ids
        lambda: with_pairs("$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2"),  # XLNet's
        lambda: with_pairs("[CLS]:0 $B:1 [SEP]:0 $A:0 [SEP]:1"),  # the other way round
    ],
)
def test_a_tokenizer_that_makes_no_pairs_that_can_be_read(make):
    assert frame_of(make()) is None
    with pytest.raises(UserError, match="the tokenizer makes no pairs of texts"):
        pairs_of(make()).rows(["a"], ["b"])


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_pairs("[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0"),
        with_pairs("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", inputs=("input_ids", "attention_mask")),
    ],
)
def test_a_tokenizer_that_makes_no_segment_ids(tokenizer):
    assert frame_of(tokenizer).has_segment_ids is False
    assert pairs_of(tokenizer).has_segment_ids is False
    assert pairs_of(tiny.bert()).has_segment_ids is True
    assert replace(pairs_of(tiny.bert()), pairs=False).has_segment_ids is False


# --- rows of data ---


@pytest.mark.parametrize("make", MAKERS)
def test_ids_are_those_that_the_tokenizer_makes_of_the_pair(make, tmp_path):
    tokenizer, rows = make(), random_rows(0, 80)
    found = rows_of(rows, tmp_path, tokenizer, max_seq_len=1000)
    for row, comparison in zip(rows, found, strict=True):
        own = [tokenizer(row["prompt"], answer) for answer in answers_of(row)]
        assert wholes(comparison) == [each["input_ids"] for each in own]
        begin = next(i for i, segment in enumerate(own[0].sequence_ids()) if segment == 1)
        assert (comparison.prompt_tokens, comparison.two_segments) == (begin, True)
        assert comparison.prompt[:begin] == own[0]["input_ids"][:begin]
    lengths = [max(map(len, wholes(comparison))) for comparison in found]
    assert found.lengths.tolist() == lengths


def test_responses_that_begin_alike_share_a_beginning_that_is_not_the_prompt(tmp_path):
    tokenizer = tiny.bert()
    (row,) = rows_of([PAIR | {"chosen": "the cat", "rejected": "the mat"}], tmp_path, tokenizer)
    asked = len(tokenizer(PAIR["prompt"])["input_ids"])
    assert row.prompt_tokens == row.asked == asked < len(row.prompt)
    assert row.text(1) == Comparison(
        tokenizer(PAIR["prompt"])["input_ids"],
        [tokenizer(PAIR["prompt"], "the mat")["input_ids"][asked:]],
        two_segments=True,
    )


@pytest.mark.parametrize("make", MAKERS)
def test_rows_to_score_are_those_of_training(make, tmp_path):
    tokenizer, rows = make(), random_rows(1, 40)
    found = rows_of([*rows, {"prompt": "", "response": "fish"}], tmp_path, tokenizer, max_seq_len=1000)
    prompts, responses = [row["prompt"] for row in rows] + [""], [answers_of(row)[0] for row in rows] + ["fish"]
    scored = pairs_of(tokenizer).rows(prompts, responses)
    for one, other in zip(found, scored, strict=True):
        assert (wholes(one)[:1], one.two_segments) == (wholes(other), other.two_segments)
        assert one.asked == other.asked or not one.two_segments
    assert not scored[-1].two_segments


def test_text_with_special_tokens_in_it(tmp_path):
    """As the tokenizer reads them: the segment that it is in decides, not the separator."""
    tokenizer = tiny.bert()
    row = {"prompt": "[CLS]the cat[SEP] sat", "response": "the [SEP]mat[SEP]"}
    (found,) = rows_of([row], tmp_path, tokenizer)
    own = tokenizer(row["prompt"], row["response"])
    assert wholes(found) == [own["input_ids"]]
    assert found.asked == own["token_type_ids"].index(1)


def test_an_answer_of_unknown_characters_is_empty(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(BPE({"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, **{c: i for i, c in enumerate(" abcehst", 3)}}, []))
    template = {"single": "[CLS] $A [SEP]", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    words.post_processor = processors.TemplateProcessing(**template, special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **roles)
    with pytest.raises(UserError, match="row 1: rejected is empty once tokenized"):
        rows_of([{"prompt": "the cat ", "chosen": "sat", "rejected": "\u200b4"}], tmp_path, tokenizer)


# --- cutting ---


@pytest.mark.parametrize("make", MAKERS)
def test_the_prompt_is_cut_as_transformers_cuts_the_first_text(make, tmp_path, capsys):
    tokenizer = make()
    row = {"prompt": "the cat sat on the mat and " * 5 + "what does it eat?", "response": "fish and the mat"}
    (found,) = rows_of([row], tmp_path, tokenizer, max_seq_len=24)
    assert "1 with the prompt cut from the left to fit 24 tokens" in capsys.readouterr().out
    tokenizer.truncation_side = "left"
    own = tokenizer(row["prompt"], row["response"], truncation="only_first", max_length=24)
    assert wholes(found) == [own["input_ids"]]
    assert found.asked == own.sequence_ids().index(1)
    assert found.two_segments


@pytest.mark.parametrize("make", MAKERS)
def test_the_whole_prompt_may_go_but_no_separator(make, tmp_path):
    tokenizer = make()
    before, between, after, _ = frame_of(tokenizer)
    answer = tokenizer("fish and the mat", add_special_tokens=False)["input_ids"]
    row = {"prompt": "the cat sat", "response": "fish and the mat"}
    least = len(before) + len(between) + len(answer) + len(after)
    (found,) = rows_of([row], tmp_path, tokenizer, max_seq_len=least)
    assert wholes(found) == [[*before, *between, *answer, *after]]
    assert found.asked == len(before) + len(between)
    with pytest.raises(UserError, match=f"alone is longer than --max_seq_len {least - 1}: {least} tokens"):
        rows_of([row], tmp_path, tokenizer, max_seq_len=least - 1)


def test_the_longer_answer_decides_how_much_is_cut(tmp_path):
    tokenizer = tiny.bert()
    row = {"prompt": "the cat sat on the mat and " * 5, "chosen": "fish", "rejected": "the mat and the other cat"}
    (found,) = rows_of([row], tmp_path, tokenizer, max_seq_len=24)
    own = [tokenizer(row["prompt"], row[side])["input_ids"] for side in ("chosen", "rejected")]
    surplus = max(map(len, own)) - 24
    assert surplus > 0
    assert wholes(found) == [[ids[0], *ids[1 + surplus :]] for ids in own]


# --- rows that stay one text ---


@pytest.mark.parametrize("make", MAKERS)
def test_a_response_without_a_prompt_is_one_text(make, tmp_path, capsys):
    tokenizer = make()
    rows = [{"prompt": "", "response": "the cat sat"}, {"prompt": "", "chosen": "fish", "rejected": "mat"}, PAIR]
    found = list(rows_of(rows, tmp_path, tokenizer))
    assert wholes(found[0]) == [tokenizer("the cat sat")["input_ids"]]
    assert wholes(found[1]) == [tokenizer(text)["input_ids"] for text in ("fish", "mat")]
    assert [row.two_segments for row in found] == [False, False, True]
    said = "2 of 3 rows are without a prompt (in its field, or before the mark of the last turn), and read as one text"
    assert said in capsys.readouterr().out


def test_a_dialogue_is_a_pair_where_a_mark_says_so(tmp_path):
    """What two texts have in common by chance is no prompt: the score of one would depend on the other."""
    tokenizer = tiny.bert()
    marked = "\n\nHuman: Where is the cat?\n\nAssistant:"
    rows = [
        {"chosen": f"{marked} There.", "rejected": f"{marked} The mat."},
        {"chosen": "Q: Where is the cat? The cat is there.", "rejected": "Q: Where is the cat? The cat sat."},
    ]
    first, second = rows_of(rows, tmp_path, tokenizer)
    assert wholes(first) == [tokenizer(marked, answer)["input_ids"] for answer in (" There.", " The mat.")]
    assert wholes(second) == [tokenizer(rows[1][side])["input_ids"] for side in ("chosen", "rejected")]
    assert (first.two_segments, second.two_segments) == (True, False)


def test_what_a_chat_template_wrote_stays_as_it_is(tmp_path, capsys):
    tokenizer = tiny.bert(chat_template=tiny.CHATML)
    hi, hello, hey = ({"role": role, "content": text} for role, text in zip(["user"] + ["assistant"] * 2, "abc"))
    rows = [{"prompt": [hi], "chosen": [hello], "rejected": [hey]}, PAIR]
    first, second = rows_of(rows, tmp_path, tokenizer)
    text = tokenizer.apply_chat_template([hi, hello], tokenize=False)
    assert wholes(first)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (first.two_segments, second.two_segments) == (False, True)
    assert 0 < first.asked < len(wholes(first)[0])
    out = capsys.readouterr().out
    assert "1 of 2 rows is written by the chat template, and read as one text, not as a pair" in out
    assert "--chat puts them through it" not in out  # nothing is joined


def test_nothing_is_said_of_how_pairs_are_joined(tmp_path, capsys):
    rows_of([PAIR], tmp_path, tiny.bert(), pairs=False)
    assert "joined with nothing between" in capsys.readouterr().out
    rows_of([PAIR], tmp_path, tiny.bert())
    assert "joined" not in capsys.readouterr().out


@pytest.mark.parametrize("pairs", [False, True])
def test_pairs_are_not_answered_from_the_cache_of_joined_texts(pairs, tmp_path):
    tokenizer = tiny.bert()
    rows_of([PAIR], tmp_path, tokenizer, pairs=not pairs)
    (found,) = rows_of([PAIR], tmp_path, tokenizer, pairs=pairs)
    assert found.two_segments is pairs
    joined = tokenizer(PAIR["prompt"] + PAIR["chosen"])["input_ids"]
    assert (wholes(found)[0] == joined) is not pairs


# --- batches ---


@pytest.mark.parametrize("kind", ["separate", "unpadded"])
def test_segment_ids_are_those_of_the_tokenizer(kind, tmp_path):
    """Rows of every length in a batch, texts of one segment among them, and texts that come twice."""
    tokenizer, rows = tiny.bert(), random_rows(2, 24)
    rows = [*rows, {"prompt": "", "response": "the cat"}, *rows[:4]]
    found = list(rows_of(rows, tmp_path, tokenizer, max_seq_len=1000))
    batch = collate(found, Layout(kind, tokenizer.pad_token_id))
    ids, segments = batch.tokens.input_ids.flatten(), batch.tokens.segment_ids().flatten()
    expected = {}
    for row in rows:
        for answer in answers_of(row):
            own = tokenizer(row["prompt"], answer) if row["prompt"] else tokenizer(answer)
            expected[tuple(own["input_ids"])] = own["token_type_ids"]
    tokens = batch.tokens
    assert len(tokens.ends) == len(expected) < sum(len(answers_of(row)) for row in rows)
    for span, length in zip(tokens.spans, tokens.span_lengths):
        text = span[:length]
        assert segments[text].tolist() == expected[tuple(ids[text].tolist())]
    is_pad = tokens.attention_mask.flatten() == 0
    assert not segments[is_pad].any()
    if kind == "separate":
        padded = tokenizer.pad({"input_ids": list(map(list, expected)), "token_type_ids": list(expected.values())})
        own = {tuple(i): t for i, t in zip(padded["input_ids"], padded["token_type_ids"])}
        assert {tuple(i): t for i, t in zip(tokens.input_ids.tolist(), tokens.segment_ids().tolist())} == own


def test_equal_ids_of_one_and_of_two_segments_are_two_texts():
    rows = [
        Comparison([5, 6], [[7, 6]], prompt_hash=1, two_segments=two, prompt_tokens=2, targets=[1.0])
        for two in (True, False, True)
    ]
    for groups in (None, [0, 0, 0]):
        batch = collate(rows, Layout("unpadded", 0), groups=groups)
        assert torch.sort(batch.tokens.segment_lengths).values.tolist() == [0, 2]
        assert batch.tokens.segment_ids().sum() == 2


def test_texts_of_one_segment_are_all_zeros():
    rows = [Comparison([1, 2], [[3], [4, 5]], [0], [1]), Comparison([], [[7]], targets=[1.0])]
    assert not collate(rows, Layout("separate", 0)).tokens.segment_ids().any()
