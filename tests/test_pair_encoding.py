# SPDX-License-Identifier: Apache-2.0
"""Encoders read pairs: the same scores as Transformers' on ``tokenizer(prompt, response)``, from training to use."""

import json
import re
from dataclasses import asdict

import models
import numpy as np
import pytest
import runs
import tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from reward_model.batching.batch import Tokens
from reward_model.commands import check, export
from reward_model.common.errors import UserError
from reward_model.config.evaluation import EvaluateConfig
from reward_model.config.options import RunConfig
from reward_model.data.encoding import Encoding
from reward_model.inference import load
from reward_model.judging.api import evaluate
from reward_model.models import attention_choice, pair_encoding, saving
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import head_layer
from reward_model.training import fresh_load, model_card, resume, verify

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = {
    "electra": ("ElectraModel", "ElectraConfig", models.SIZES | {"embedding_size": 32}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", models.SIZES | {"local_attention": 16}),
}
FAMILIES = ["bert", "roberta", "deberta", "electra", "modernbert"]
TOLD = ["bert", "electra"]  # which tokens are the response's
WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]


def texts_of(seed, count):
    """Prompts and responses of various lengths, the same prompt several times among them."""
    chance = np.random.default_rng(seed)

    def said(least, most):
        return " ".join(chance.choice(WORDS, int(chance.integers(least, most))))

    prompts = [said(1, 12) for _ in range(-(-count // 3))]
    return [prompts[i // 3] for i in range(count)], [said(1, 9) + f" {i}" for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def more_families():
    with pytest.MonkeyPatch.context() as patch:
        for name, made in MORE.items():
            patch.setitem(models.FAMILIES, name, made)
            patch.setitem(models.TOKENIZERS, name, modern if name == "modernbert" else tiny.bert)
        yield


def modern(folder):
    """ModernBERT's tokenizer makes pairs, and no segment ids."""
    return tiny.bert(folder, inputs=("input_ids", "attention_mask"))


def moved(scorer, seed=5):
    """Weights as large as trained ones, of segments, too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.5 if "token_type" in name else 0.05) * torch.randn_like(parameter))
        head_layer(scorer).weight.add_(0.3 * torch.randn_like(head_layer(scorer).weight))
    return scorer.eval()


class Trained:
    """An encoder in memory that reads pairs, as a run has it."""

    def __init__(self, family, folder, pairs=True, lora=False, **options):
        tokenizer = models.write(family, folder / "base")
        self.scorer = load_for_training(str(folder / "base"), torch.float32, seed=3, **options)
        if lora:
            add_lora(self.scorer, 4, 4.0, None)
        moved(self.scorer)
        special = models_special(tokenizer)
        for config in (self.scorer.config, self.scorer.config.get_text_config()):
            config.pad_token_id = special.pad
        self.encoding = Encoding(tokenizer, special, pairs)
        self.scorer.read_with(self.encoding)
        self.forward = ForwardPass(self.scorer, self.scorer, torch.float32, torch.device("cpu"), special.pad)
        self.folder = folder / "out"

    def save(self):
        self.names = saving.save(self.scorer, self.encoding.tokenizer, self.folder)
        return self.folder


def models_special(tokenizer):
    from reward_model.data.tokenizer import choose_special_tokens

    return choose_special_tokens(tokenizer, models.VOCABULARY)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each family, made when it is asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = Trained(family, tmp_path_factory.mktemp(family)).save()
        return made[family]

    return of


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(attention_choice, "first_text", lambda text: text)


@torch.no_grad()
def by_transformers(folder, prompts, responses):
    """Scores by Transformers alone, in one batch with pads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(list(prompts), list(responses), padding=True, return_tensors="pt")
    return model(**batch).logits[:, 0].tolist()


# --- scores ---


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_on_pairs(family, saved):
    folder, (prompts, responses) = saved(family), texts_of(0, 17)
    reward = load(folder)
    expected = by_transformers(folder, prompts, responses)
    assert reward.encoding.pairs
    assert reward.scorer.takes_segment_ids is (family in TOLD)
    assert np.std(expected) > 0.005
    for size in (1, 5, 16):
        assert reward.score(prompts, responses, batch_size=size) == pytest.approx(expected, abs=1e-5)


def test_the_pipeline_of_transformers_gives_the_same_score(saved):
    from transformers import pipeline

    folder, (prompts, responses) = saved("bert"), texts_of(0, 5)
    asked = [{"text": prompt, "text_pair": response} for prompt, response in zip(prompts, responses)]
    found = [each["score"] for each in pipeline("text-classification", model=str(folder))(asked)]
    assert load(folder).score(prompts, responses) == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("family", TOLD)
def test_segment_ids_and_the_separator_change_scores(family, saved):
    """Otherwise the test above would pass without them."""
    reward, (prompts, responses) = load(saved(family)), texts_of(0, 17)
    right = np.array(reward.score(prompts, responses))
    reward.scorer.takes_segment_ids = False
    assert np.abs(np.array(reward.score(prompts, responses)) - right).min() > 1e-3
    joined = load(saved(family))
    joined.encoding = Encoding(joined.tokenizer, joined.special)
    assert np.abs(np.array(joined.score(prompts, responses)) - right).min() > 1e-4


@pytest.mark.parametrize("attention", ["varlen", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluations_read_pairs(family, attention, saved, tmp_path):
    """In rows of their own and in one row without pads; prompts come three times."""
    if family == "deberta" and attention == "varlen":
        pytest.skip("its attention cannot be told texts apart")
    folder, (prompts, responses) = saved(family), texts_of(1, 24)
    scores = np.array(by_transformers(folder, prompts, responses))
    rows = [
        {"prompt": prompts[i], "chosen": responses[i], "rejected": responses[j]}
        for i in range(24)
        for j in (i - i % 3 + (i + 1) % 3,)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gaps = np.array([scores[i] - scores[i - i % 3 + (i + 1) % 3] for i in range(24)])
    config = EvaluateConfig(data=[str(tmp_path / "rows.jsonl")], data_output_path=str(tmp_path), attention=attention)
    (found,) = evaluate([str(folder)], config).assessments
    assert found["gap"]["mean"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert found["loss"] == pytest.approx(np.logaddexp(0, -gaps).mean(), abs=1e-5)
    worst = found["mistakes"][0]
    row = rows[int(gaps.argmin())]
    assert [worst[name].strip() for name in ("prompt", "chosen")] == [row["prompt"], row["chosen"]]


@torch.no_grad()
def test_mean_pooling_reads_pairs_too(tmp_path):
    trained = Trained("bert", tmp_path, pooling="mean")
    prompts, responses = texts_of(0, 9)
    reward = load(trained.save())
    assert reward.encoding.pairs
    expected = []
    for prompt, response in zip(prompts, responses):
        own = trained.encoding.tokenizer(prompt, response, return_tensors="pt")
        hidden = trained.scorer.backbone(**own)[0][0]
        expected.append((hidden.mean(0) @ trained.scorer.model.v_head.weight[0]).item())
    assert np.std(expected) > 0.05
    assert reward.score(prompts, responses) == pytest.approx(expected, abs=1e-5)
    forward = trained.forward
    batch = [row.text(0) for row in trained.encoding.rows(prompts, responses)]
    from reward_model.batching.collate import collate
    from reward_model.models.attention import ON_CPU

    forward.use(ON_CPU[-1])  # varlen
    made = collate(batch, forward.layout)
    assert forward(made, made.tokens.ends).tolist() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_embedding_of_both_segments(tmp_path, one_rank):
    from reward_model.batching.collate import collate

    trained = Trained("bert", tmp_path, dropout=0.0)
    said = trained.forward.choose_attention(longest=40)
    assert "varlen" in said
    batch = collate(trained.encoding.rows(*texts_of(0, 6)), trained.forward.layout)
    trained.forward(batch, batch.tokens.ends).square().sum().backward()
    gradient = trained.scorer.backbone.embeddings.token_type_embeddings.weight.grad
    assert (gradient.abs().amax(1) > 0).tolist() == [True, True]


@pytest.mark.parametrize("pairs", [True, False])
def test_what_the_card_shows_gives_the_score(pairs, tmp_path):
    """Also of joined texts, which BERT's tokenizer closes by itself."""
    trained = Trained("bert", tmp_path, pairs=pairs)
    folder, special = trained.save(), trained.encoding.special
    run = {"pair_encoding": pairs, "special": {"end": special.end}}
    told = model_card.Trained(run, {}, 1, 1, {"bad_steps": {"count": 0}, "alarms": []}, {})
    card = model_card.card_of(str(folder), trained.names, trained.encoding.tokenizer, told)
    by_transformers, by_ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ('2 + 2 =", "4"' in by_transformers) is pairs
    found: dict = {}
    exec(by_transformers, found)
    exec(by_ours.replace("reward.score(", "scores = reward.score("), found)
    assert found["scores"] == pytest.approx([found["score"].item()], abs=1e-5)


# --- how it is decided ---


def write_config(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_model_of_others_reads_pairs_unless_it_says_otherwise(saved, tmp_path):
    folder = Trained("bert", tmp_path).save()
    assert json.loads((folder / "config.json").read_text())["score_pairs"] is True
    write_config(folder, score_pairs=None)
    assert load(folder).encoding.pairs is True
    write_config(folder, score_pairs=False)
    assert load(folder).encoding.pairs is False
    write_config(folder, score_pairs=None)
    (folder / "run.json").write_text(json.dumps({"content": {}}))  # of this trainer, before there were pairs
    assert load(folder).encoding.pairs is False
    (folder / "run.json").write_text(json.dumps({"content": {}, "pair_encoding": True}))
    assert load(folder).encoding.pairs is True


@pytest.mark.parametrize("said", [True, None])
def test_a_tokenizer_that_makes_no_pairs(said, tmp_path, capsys):
    folder = Trained("bert", tmp_path).save()
    write_config(folder, score_pairs=said)
    tiny.bert(folder, pair="$A:0 $B:1")
    if said:
        with pytest.raises(UserError, match=r"out: config\.json says score_pairs, but its tokenizer makes no pairs"):
            load(folder)
        return
    assert load(folder).encoding.pairs is False
    assert "prompt and response are joined: its tokenizer makes no pairs" in capsys.readouterr().out


@pytest.mark.parametrize("family", [*FAMILIES, "ernie", "llama", "gpt2", "cohere"])
def test_encoders_are_known_by_their_configuration(family, tmp_path):
    models.write(family, tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert pair_encoding.is_encoder(config) is (scorer.pooling == "classifier") is (family in [*FAMILIES, "ernie"])


def decide(family, folder, wanted=None, chat=False, is_trained=False, make=None):
    tokenizer = models.write(family, folder)
    config = AutoConfig.from_pretrained(folder)
    return pair_encoding.for_training(wanted, str(folder), config, make() if make else tokenizer, chat, is_trained)


def test_the_model_decides_unless_the_flag_does(tmp_path, capsys):
    assert decide("bert", tmp_path / "1") is True
    assert "the encoder reads pairs, tokenizer(prompt, response)\n" in capsys.readouterr().out
    assert decide("bert", tmp_path / "2", wanted=False) is False
    assert "the encoder reads prompt and response joined as one text\n" in capsys.readouterr().out
    assert decide("bert", tmp_path / "3", chat=True) is False
    assert "joined as one text: --chat writes each row as one text" in capsys.readouterr().out
    assert decide("bert", tmp_path / "4", make=tiny.llama) is False
    assert "joined as one text: its tokenizer makes no pairs" in capsys.readouterr().out
    assert decide("llama", tmp_path / "5") is decide("llama", tmp_path / "5", wanted=False) is False
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--pair_encoding: this model is a decoder"):
        decide("llama", tmp_path / "5", wanted=True)
    with pytest.raises(UserError, match=r"--pair_encoding: .*: its tokenizer makes no pairs"):
        decide("bert", tmp_path / "4", wanted=True, make=tiny.llama)


@pytest.mark.parametrize("before", [True, False])
def test_a_reward_model_goes_on_as_it_was_trained(before, tmp_path, capsys):
    folder = Trained("bert", tmp_path, pairs=before).save()
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def asked(wanted, is_trained=True):
        return pair_encoding.for_training(wanted, str(folder), config, tokenizer, False, is_trained)

    capsys.readouterr()
    assert asked(None) is asked(before) is before
    assert "was trained on" not in capsys.readouterr().out
    assert asked(not before) is not before
    assert "was trained on" in capsys.readouterr().out
    assert asked(None, is_trained=False) is True  # a new head


def test_a_run_that_encodes_otherwise_is_another_run():
    runs_of = {value: {"pair_encoding": value, "seed": 1} for value in (True, False)}
    assert resume.differences(runs_of[True], runs_of[False]) == ["--pair_encoding (True there, False here)"]
    assert resume.differences({"seed": 1}, runs_of[False]) == []  # before there were pairs
    assert resume.differences({"seed": 1}, runs_of[True]) == ["--pair_encoding (False there, True here)"]


def test_a_template_that_writes_every_row_leaves_no_pairs():
    with pytest.raises(UserError, match="--pair_encoding and --chat: the chat template writes each row as one text"):
        RunConfig.of(model_name_or_path="x", pair_encoding=True, chat=True)
    assert RunConfig.of(model_name_or_path="x").data.pair_encoding is None
    assert RunConfig.of(model_name_or_path="x", pair_encoding=False, chat=True).data.pair_encoding is False


def test_check_knows_pairs(tmp_path, capsys):
    """Nothing is joined, so that nothing is doubtful; and a decoder refuses before a process starts."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat?", "chosen": "sat", "rejected": "mat"}) + "\n")
    flags = ["--data_path", str(tmp_path / "rows.jsonl"), "--model_name_or_path", str(tmp_path / "model")]
    models.write("bert", tmp_path / "model")
    assert check.main(flags) == 0
    assert "joined with nothing between" not in capsys.readouterr().out
    assert check.main([*flags, "--pair_encoding", "false"]) == 0
    assert "joined with nothing between" in capsys.readouterr().out
    models.write("llama", tmp_path / "model")
    with pytest.raises(UserError, match="--pair_encoding: this model is a decoder"):
        check.main([*flags, "--pair_encoding"])


def test_an_adapter_alone_keeps_how_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts, responses = texts_of(0, 5)
    trained = Trained("bert", tmp_path, pairs=False, lora=True)
    expected = load(trained.save()).score(prompts, responses)
    (trained.folder / "adapter").rename(tmp_path / "alone")
    reward = load(tmp_path / "alone")
    assert reward.encoding.pairs is False
    assert reward.score(prompts, responses) == pytest.approx(expected, abs=1e-5)


# --- the check of what was saved ---


def problem_of(trained, expected):
    question = {"folder": trained.folder, "forms": ["hf"], "ids": expected.ids, "second": expected.second}
    question |= {"written": [asdict(each) for each in expected.written], "settings": list(expected.settings)}
    return verify.difference(
        fresh_load.answer(question), expected, trained.encoding.tokenizer, trained.encoding.special
    )


def expect(trained):
    rows = trained.encoding.rows(*texts_of(0, 9))
    return verify.expect(trained.forward, rows, trained.encoding.tokenizer, trained.encoding.special)


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"lora": True}, {"pairs": False}], ids=str)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_was_saved_is_asked_for_pairs(family, options, tmp_path):
    trained = Trained(family, tmp_path, **options)
    expected = expect(trained)
    pairs = options.get("pairs", True)
    assert [count > 0 for count in expected.second] == [pairs] * 9
    assert [each.prompt is not None for each in expected.written] == [False] * 4 + [pairs] * 4
    assert expected.settings["score_pairs"] is pairs
    trained.save()
    assert problem_of(trained, expected) == ""
    write_config(trained.folder, score_pairs=not pairs)
    assert problem_of(trained, expected).startswith(f"score_pairs is {not pairs} in config.json and was {pairs}")


def test_segment_ids_left_out_of_training_are_found(tmp_path, monkeypatch):
    trained = Trained("bert", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tokens, "segment_ids", lambda tokens: torch.zeros_like(tokens.input_ids))
        expected = expect(trained)
    trained.save()
    assert "form hf gives held-out text" in problem_of(trained, expected)


def test_a_saved_tokenizer_that_makes_other_pairs_is_found(tmp_path):
    trained = Trained("bert", tmp_path)
    expected = expect(trained)
    trained.save()
    tiny.bert(trained.folder, pair="[CLS]:0 $A:0 [SEP]:0 $B:1")
    assert "the saved tokenizer gives text 5 other ids than training had" in problem_of(trained, expected)


# --- whole runs ---

LONGEST = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The answer with a fish is the better one. Some texts are longer than what the model takes."""
    folder, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train", 128), ("eval", 50)):
        prompts, answers = texts_of(len(name), count)
        rows = [
            {"prompt": f"{prompt} " * int(chance.integers(1, 5)), "chosen": f"{answer} fish", "rejected": answer[2:]}
            for prompt, answer in zip(prompts, answers)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags_of(family, folder, data):
    models.write(family, folder)
    flags = ["--model_name_or_path", folder, "--data_path", data, "--max_seq_len", LONGEST, "--dropout", 0]
    return [*flags, "--learning_rate", 3e-3, "--num_train_epochs", 2]


@torch.no_grad()
def held_out_scores(folder, data, left_out=()):
    """Of chosen and rejected by Transformers alone, cut as training cuts: by the longer answer of a row.

    left_out: what the tokenizer makes, and the model is not given.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores, cut = {"chosen": [], "rejected": []}, 0
    for line in (data / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        lengths = {side: len(tokenizer(row["prompt"], row[side])["input_ids"]) for side in scores}
        surplus = max(0, max(lengths.values()) - LONGEST)
        cut += surplus > 0
        for side, length in lengths.items():
            how = {"truncation": "only_first", "max_length": length - surplus, "return_tensors": "pt"}
            made = tokenizer(row["prompt"], row[side], **how)
            scores[side].append(model(**{k: v for k, v in made.items() if k not in left_out}).logits.item())
    return scores, cut


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_encoder_scores_in_transformers_as_it_was_evaluated(family, demo, data, tmp_path):
    metrics = runs.train(demo, tmp_path / "out", *flags_of(family, tmp_path / "base", data))
    assert "the encoder reads pairs, tokenizer(prompt, response)" in metrics.output
    assert metrics.final["loss"] < metrics.evaluations[0]["loss"]
    scores, cut = held_out_scores(tmp_path / "out", data)
    said = re.search(r"eval\.jsonl: 50 rows, (\d+) with the prompt cut", metrics.output)
    assert 0 < cut == int(said[1]) < 50
    for side, found in scores.items():
        assert metrics.final[f"{side}_mean"] == pytest.approx(np.mean(found), abs=1e-5)
    if family in TOLD:  # else what was compared would say nothing of segment ids
        others, _ = held_out_scores(tmp_path / "out", data, left_out=("token_type_ids",))
        assert abs(np.mean(others["chosen"]) - metrics.final["chosen_mean"]) > 1e-3
    assert np.std(scores["chosen"] + scores["rejected"]) > 1e-2
    assert "model_input_names" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["pair_encoding"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["score_pairs"] is True


@pytest.mark.slow
def test_a_checkpoint_is_exported_as_it_was_trained(demo, data, tmp_path, capsys):
    flags = [*flags_of("bert", tmp_path / "base", data), "--save_interval", 4, "--max_steps", 4]
    runs.train(demo, tmp_path / "out", *flags)
    assert export.main([str(tmp_path / "out"), str(tmp_path / "model")]) == 0
    assert "verified: loaded afresh" in capsys.readouterr().out
    (tmp_path / "model" / "run.json").unlink(missing_ok=True)
    one, other = (load(tmp_path / name) for name in ("out", "model"))
    assert other.encoding.pairs is True
    assert other.score(*texts_of(0, 5)) == pytest.approx(one.score(*texts_of(0, 5)), abs=1e-6)


@pytest.mark.slow
def test_joined_texts_when_told(demo, data, tmp_path):
    flags = [*flags_of("bert", tmp_path / "base", data), "--pair_encoding", "false", "--max_steps", 2]
    metrics = runs.train(demo, tmp_path / "out", *flags)
    assert "the encoder reads prompt and response joined as one text" in metrics.output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["pair_encoding"] is False
    assert json.loads((tmp_path / "out" / "config.json").read_text())["score_pairs"] is False
    assert load(tmp_path / "out").encoding.pairs is False
