# SPDX-License-Identifier: Apache-2.0
"""What ``inference.py`` has for trainers of policies: TRL's reward function, and OpenRLHF's queries."""

import models
import pytest
import tiny
import torch

from reward_model.common.errors import UserError
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.inference import RewardScorer
from reward_model.models.loading import load_for_training
from reward_model.models.scorer import head_layer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["where is the cat?", "the cat", "where is the cat?"]
ANSWERS = [" on the mat", " sat there. the other cat sat on the mat", " the cat eats fish"]
TAKES_TOOLS = "{% if tools %}[tools: {{ tools[0].name }}]{% endif %}{% if loud %}LOUD{% endif %}" + tiny.CHATML


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """The scorer of one tiny model, with the tokenizer that is asked for."""
    folder = tmp_path_factory.mktemp("callables")
    models.write("llama", folder, max_position_embeddings=256)
    loaded = load_for_training(str(folder), torch.float32, seed=0)
    loaded.config.score_mean = 0.25
    with torch.no_grad():
        head_layer(loaded).weight.mul_(8)

    def with_tokenizer(make=tiny.tokenizer):
        tokenizer = make()
        pad = choose_special_tokens(tokenizer, models.VOCABULARY).pad
        return RewardScorer(loaded, tokenizer, pad=pad)

    return with_tokenizer


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_texts_of_trl_are_scored_as_score_does(scorer):
    reward = scorer()
    found = reward(prompts=PROMPTS, completions=ANSWERS, completion_ids=[[1], [2], [3]], trainer_state=None)
    assert found == pytest.approx(reward.score(PROMPTS, ANSWERS), abs=1e-6)
    assert len(set(found)) == 3
    assert reward(prompts=[], completions=[]) == []


def test_chats_of_trl_are_scored_as_score_chats_does(scorer):
    reward = scorer(tiny.chatml)
    prompts, completions = [user(text) for text in PROMPTS], [assistant(text) for text in ANSWERS]
    found = reward(prompts=prompts, completions=completions)
    assert found == pytest.approx(reward.score_chats([p + c for p, c in zip(prompts, completions)]), abs=1e-6)
    assert len(set(found)) == 3


def test_nothing_to_score_is_none_and_the_others_keep_their_places(scorer):
    reward = scorer(tiny.chatml)
    mixed = reward(
        prompts=[PROMPTS[0], user("a"), PROMPTS[1], user("a")], completions=[None, [], ANSWERS[1], assistant("b")]
    )
    assert mixed[:2] == [None, None]
    assert mixed[2:] == pytest.approx(
        [*reward.score(PROMPTS[1:2], ANSWERS[1:2]), *reward.score_chats([user("a") + assistant("b")])], abs=1e-6
    )
    assert reward(prompts=["x"], completions=[""]) == pytest.approx(reward.score(["x"], [""]), abs=1e-6)


def test_columns_for_the_chat_template_reach_it(scorer):
    """As in training, where a row's tools and arguments do."""
    reward = scorer(lambda: tiny.chatml(chat_template=TAKES_TOOLS))
    tools = [[{"name": "lamp"}], None, [{"name": "lamp"}], []]
    arguments = [{}, {"loud": True}, None, {}]
    chats = [user("a") + assistant("b")] * 4
    found = reward(
        prompts=[chat[:1] for chat in chats],
        completions=[chat[1:] for chat in chats],
        tools=tools,
        chat_template_kwargs=arguments,
        answer=["x"] * 4,
    )
    plain, lamp, loud = (
        reward.score_chats(chats[:1], **given)[0] for given in ({}, {"tools": [{"name": "lamp"}]}, {"loud": True})
    )
    assert found == pytest.approx([lamp, loud, lamp, plain], abs=1e-6)
    assert len({plain, lamp, loud}) == 3


@pytest.mark.parametrize(
    ("prompts", "completions", "columns", "message"),
    [
        (["a"], ["b", "c"], {}, "1 prompts and 2 completions: give one of each per text"),
        ([user("a")], ["b"], {}, "prompt 1 and its completion: one is text, the other messages"),
        (["a", "a"], ["b", assistant("b")], {}, "prompt 2 and its completion: one is text, the other messages"),
        ([user("a")], [assistant("b")], {"tools": ["{"]}, "prompt 1: tools is text that is not JSON"),
    ],
)
def test_a_mistake_is_a_line(prompts, completions, columns, message, scorer):
    with pytest.raises(UserError) as raised:
        scorer(tiny.chatml)(prompts=prompts, completions=completions, **columns)
    assert str(raised.value) == message


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer, tiny.llama])
def test_queries_have_one_start_and_one_end(tokenizer, scorer):
    """Whole ones, cut ones, ones that have a start token, and those whose prompt was cut."""
    reward = scorer(tokenizer)
    ours = reward.score(PROMPTS, ANSWERS)
    assert max(ours) - min(ours) > 0.1
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS)]
    end, start = reward.tokenizer.eos_token, reward.tokenizer.bos_token or ""
    for queries, prompts in [
        ([text + end for text in texts], PROMPTS),
        (texts, PROMPTS),
        ([start + text + end for text in texts], [start + prompt for prompt in PROMPTS]),
        ([text + end for text in texts], ["of what " + prompt for prompt in PROMPTS]),
    ]:
        assert reward.score_queries(queries, prompts) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("after", ["", "\n"])
def test_queries_that_a_chat_template_wrote(after, scorer):
    """No start token is put before them; one that was cut, or stops where the policy does, is closed as a turn is."""

    def chatml_with_start():
        return tiny.tokenizer(
            opening=tiny.BOS,
            bos_token=tiny.BOS,
            reserved=("<|im_start|>", "<|im_end|>"),
            chat_template=tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>" + after),
        )

    reward = scorer(chatml_with_start)
    chats = [user(prompt) + assistant(answer) for prompt, answer in zip(PROMPTS, ANSWERS)]
    ours = reward.score_chats(chats)
    assert max(ours) - min(ours) > 0.1
    queries = [reward.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    prompts = [
        reward.tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    stopped = [query.removesuffix(after) for query in queries]
    cut = [query.removesuffix("<|im_end|>") for query in stopped]
    for each in (queries, stopped, cut):
        assert reward.score_queries(each, prompts) == pytest.approx(ours, abs=1e-6)
    mixed = [queries[0], PROMPTS[1] + ANSWERS[1]]
    expected = [ours[0], *reward.score(PROMPTS[1:2], ANSWERS[1:2])]
    assert reward.score_queries(mixed, ["", PROMPTS[1]]) == pytest.approx(expected, abs=1e-6)


def test_queries_are_lists_of_one_length(scorer):
    reward = scorer()
    with pytest.raises(UserError, match="1 queries and 2 prompts"):
        reward.score_queries(["a"], ["a", "b"])
    with pytest.raises(UserError, match="give lists of queries and prompts"):
        reward.score_queries("a", "a")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta", "ernie", "deberta"])
def test_a_text_beyond_the_table_of_positions_is_refused_in_words(tmp_path, family):
    models.write(family, tmp_path, **({"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}))
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0)
    reward = RewardScorer(scorer, tiny.tokenizer(), pad=scorer.config.pad_token_id)
    assert reward.positions == (38 if family == "roberta" else 40)
    fits = [5] * reward.positions
    assert len(reward.score_ids([fits])) == 1
    with pytest.raises(UserError, match=f"row 2 has a text of {reward.positions + 1} tokens, and the model takes"):
        reward.score_ids([fits, [*fits, 5]])


def test_a_text_beyond_what_the_model_was_made_for_is_told_once(scorer, capsys):
    reward = scorer()
    assert len(reward.score_ids([[5] * 300] * 2)) == len(reward.score_ids([[5] * 300])) + 1 == 2
    assert capsys.readouterr().out.count("300 tokens, more than the 256 that the model was made for") == 1
