# SPDX-License-Identifier: Apache-2.0
"""Several evaluation sets of a run, each by its name, and the subset of a row."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from test_checkpoints import ran, same_bytes, stop_at

from reward_model.batching.layout import Layout
from reward_model.batching.merging import merge
from reward_model.common.errors import UserError
from reward_model.config.options import RunConfig
from reward_model.data.comparisons import Comparisons
from reward_model.data.preprocessing import PreprocessingConfig, load_comparisons, tokenize
from reward_model.data.sources import read_sources
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.evaluation.metrics import pair_metrics
from reward_model.training.health import Health, Watch
from reward_model.training.records import Records
from reward_model.training.resume import hash_of_rows, hash_of_sets
from reward_model.training.run import TrainResult
from reward_model.training.trackers import Trackers


def sets_of(*entries):
    return RunConfig.of(model_name_or_path="m", eval_data_path=list(entries)).data.eval_sets


# --- names ---


def test_sets_are_in_the_order_in_which_they_are_named():
    assert sets_of("chat=a.jsonl", "b.jsonl", "code-2.x=owner/data:100", "c.jsonl") == {
        "chat": ["a.jsonl"],
        "": ["b.jsonl", "c.jsonl"],
        "code-2.x": ["owner/data:100"],
    }
    assert sets_of() == {}


def test_a_path_that_is_there_has_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2026").mkdir()
    (tmp_path / "year=2026" / "eval.jsonl").touch()
    assert sets_of("year=2026/eval.jsonl", "year=2026:0.5") == {"": ["year=2026/eval.jsonl", "year=2026:0.5"]}
    assert sets_of("chat=year=2026/eval.jsonl") == {"chat": ["year=2026/eval.jsonl"]}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["data/x=1/eval.jsonl"], "no such path, and no NAME=PATH"),
        (["=a.jsonl"], "no NAME=PATH"),
        (["größe=a.jsonl"], "no NAME=PATH"),
        (["chat="], "no NAME=PATH"),
        (["a=1.jsonl", "b=2.jsonl", "a=3.jsonl"], "the name a is given twice"),
    ],
)
def test_a_bad_or_double_name_is_one_line(entries, said):
    with pytest.raises(UserError, match=said) as caught:
        sets_of(*entries)
    assert str(caught.value).startswith(f"--eval_data_path {entries[-1]}: ")
    assert "\n" not in str(caught.value)


# --- rows ---


def pairs(name, *subsets):
    rows = [{"prompt": f"{name} {i}?", "chosen": f" {name} yes", "rejected": " no"} for i in range(len(subsets))]
    return [row if subset is None else row | {"subset": subset} for row, subset in zip(rows, subsets)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rules(tmp_path, own_cache):
    return PreprocessingConfig(64, "stop", tmp_path / "cache", 1)


def read(path, rules):
    tokenizer = tiny.tokenizer()
    (source,), _ = read_sources(path, seed=0, names=rules.names)
    return tokenize(source, tokenizer, choose_special_tokens(tokenizer, len(tokenizer)), rules)


def test_each_set_has_its_rows_and_its_limit(tmp_path, rules, capsys):
    train = write(tmp_path / "train.jsonl", pairs("train", *[None] * 12))
    chat, one, two = (
        write(tmp_path / f"{name}.jsonl", pairs(name, *[None] * count))
        for name, count in (("chat", 5), ("one", 2), ("two", 1))
    )
    tokenizer = tiny.tokenizer()
    special = choose_special_tokens(tokenizer, len(tokenizer))
    named = {"chat": [chat], "": [one, two]}
    rows, sets = load_comparisons([train], named, tokenizer, special, rules, 0, None, (0, 3))
    assert (len(rows), [(name, len(held)) for name, held in sets.items()]) == (12, [("chat", 3), ("", 3)])
    said = capsys.readouterr().out
    assert "3 of 5 evaluation rows of chat, drawn at random" in said
    assert "chat: 3 held-out rows: the metrics say little" in said
    with pytest.raises(UserError, match="no evaluation rows of empty are left"):
        broken = write(tmp_path / "broken.jsonl", [{"prompt": "p", "chosen": "", "rejected": "x"}])
        load_comparisons([train], {"empty": [broken]}, tokenizer, special, replace(rules, on_bad_row="skip"), 0)


def test_a_subset_is_kept_and_what_is_none_is_empty(tmp_path, rules):
    path = write(tmp_path / "rows.jsonl", pairs("a", "math", None, 7, ["x"], ""))
    rows = read(path, rules)
    assert rows.subsets().tolist() == ["math", "", "7", "", ""]
    assert [rows[i].subset for i in range(5)] == rows.subsets().tolist()
    assert rows.select(np.array([2, 0])).subsets().tolist() == ["7", "math"]


def test_another_column_may_hold_the_subset(tmp_path, rules):
    rows = [{**row, "domain": row["subset"]} for row in pairs("a", "math", "code")]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected", "domain")} for row in rows]
    found = read(write(tmp_path / "rows.jsonl", rows), replace(rules, names={"subset": "domain"}))
    assert found.subsets().tolist() == ["math", "code"]


def test_a_mixture_keeps_subsets_and_merging_ignores_them(tmp_path, rules):
    same = [{**row, "prompt": "q?"} for row in pairs("a", "math", None)]
    same[1]["chosen"] = " another"
    with_subset = write(tmp_path / "with.jsonl", same)
    without = write(tmp_path / "without.jsonl", [{**same[1], "chosen": " a third"}])
    tokenizer = tiny.tokenizer()
    special = choose_special_tokens(tokenizer, len(tokenizer))
    train = write(tmp_path / "train.jsonl", pairs("train", None))
    _, sets = load_comparisons([train], {"": [with_subset, without]}, tokenizer, special, rules, 0)
    rows = sets[""]
    assert rows.subsets().tolist() == ["math", "", ""]
    (merged,) = merge([rows[i] for i in range(3)], Layout("packed", pad=0))
    assert [i for i, _ in merged.rows] == [0, 1, 2]
    assert merged.texts.subset == ""


def test_a_run_is_known_by_rows_names_and_order_and_not_by_subsets(tmp_path, rules):
    one = read(write(tmp_path / "one.jsonl", pairs("a", "math")), rules)
    other = read(write(tmp_path / "other.jsonl", pairs("b", "math")), rules)
    named = read(write(tmp_path / "named.jsonl", pairs("a", "code")), rules)
    assert hash_of_sets({"": one}) == hash_of_rows(one) == hash_of_rows(named) != hash_of_rows(other)
    hashes = [hash_of_sets(sets) for sets in ({"x": one, "y": other}, {"y": other, "x": one}, {"x": one, "z": other})]
    assert len(set(hashes)) == 3
    assert hash_of_sets({"x": one}) != hash_of_sets({"": one})


def test_a_table_of_an_earlier_kind_has_no_subset(tmp_path, rules):
    rows = read(write(tmp_path / "rows.jsonl", pairs("a", "math")), rules)
    assert Comparisons(rows.table.remove_columns("subset"))[0].subset == ""


# --- what is told of each set ---


def test_alarms_name_the_set_and_each_set_is_watched_by_itself():
    lines = []

    class Lines:
        def add(self, values):
            lines.append(values)

    watched = Health(Watch(0.1, "fp32", 3, 32.0, True, 100), lambda rows: {})

    def evaluate(step, size, name):
        chosen, rejected = np.full(20, size), np.full(20, -size)
        metrics = pair_metrics(chosen, rejected, np.ones(20), np.ones(20))
        found = watched.after_evaluation(step, metrics, {"chosen": chosen, "rejected": rejected}, name)
        watched.tell(step, found, Lines())
        return [(alarm.kind, alarm.set) for alarm in found]

    assert evaluate(1, 5.0, "chat") == []
    assert evaluate(1, 20.0, "code") == []  # large from the start: it has not grown
    assert evaluate(2, 20.0, "code") == []
    assert evaluate(2, 20.0, "chat") == [("score_growth", "chat")]
    assert evaluate(3, 50.0, "code") == [("score_limit", "code"), ("score_growth", "code")]
    assert evaluate(4, 50.0, "code") == []
    assert (lines[0]["set"], lines[0]["kind"]) == ("chat", "score_growth")
    assert lines[0]["message"].startswith("step 2, chat: ")
    again = Health(watched.watch, watched.where)
    again.restore(json.loads(json.dumps(watched.state())))
    assert again == watched


def test_trackers_get_a_tag_for_each_set():
    events = []

    class Monitor:
        def write_events(self, new):
            events.extend(new)

    records = Records(None, Trackers({"csv": Monitor()}), True)
    records.add({"split": "eval", "step": 3, "accuracy": 0.5})
    records.add({"split": "eval", "step": 3, "set": "chat", "accuracy": 0.75})
    assert events == [("eval/accuracy", 0.5, 3), ("eval/chat/accuracy", 0.75, 3)]


def test_the_result_is_that_of_the_first_set():
    found = TrainResult.of({"chat": {"accuracy": 0.5}, "code": {"accuracy": 0.75}}, 3, None)
    assert found.metrics == {"accuracy": 0.5}
    assert found.sets["code"] == {"accuracy": 0.75}


# --- runs ---


@pytest.mark.slow
def test_a_run_with_two_sets_that_is_stopped_leaves_the_same_bytes(demo, tmp_path):
    """Stopped in an evaluation, of which no set has its line twice; and what the best is goes by the first set."""
    rows = (demo / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "easy.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "rest.jsonl").write_text("".join(rows[20:]))
    sets = ["--eval_data_path", tmp_path / "rest.jsonl", f"easy={tmp_path / 'easy.jsonl'}"]
    flags = ["--eval_interval", 2, "--keep_best", "loss", *sets]
    said = same_bytes(demo, tmp_path, flags, [stop_at(6, "SIGUSR1", in_evaluation=True)])
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(r["step"], r.get("set"), r["pairs"]) for r in records if r["split"] == "eval"]
    assert evaluations[:4] == [(0, None, 24), (0, "easy", 20), (2, None, 24), (2, "easy", 20)]
    assert len(evaluations) == len(set(evaluations)) == 2 * 7  # after steps 0, 2, 4, 5 (an epoch), 6, 8 and 10
    losses = {r["step"]: r["loss"] for r in records if r["split"] == "eval" and "set" not in r and r["step"]}
    best = min(losses, key=losses.get)
    assert f"what is saved is the best of all evaluations, step {best}: loss" in said
    assert "evaluation sets: that without a name, easy; what is best, and the result, go by the first" in said
    assert "24 + 20 held out" in said
    assert "step 10, easy: held-out accuracy" in said
    finished = json.loads((tmp_path / "cut" / "finished.json").read_text())
    assert list(finished["sets"]) == ["", "easy"]
    assert finished["metrics"] == finished["sets"][""]
    assert f"\neasy: held-out accuracy {finished['sets']['easy']['accuracy']:.4f} on 20 pairs" in said
    fixed = ["--num_train_epochs", 2, "--dropout", 0.1]
    again = ran(demo, tmp_path / "cut", *fixed, *flags)
    assert "nothing to do" in again
    other = ran(demo, tmp_path / "cut", *fixed, *flags[:-1], f"hard={tmp_path / 'easy.jsonl'}", status=1)
    assert "the held-out rows (by content; --eval_data_path changed)" in other


def test_a_set_that_cannot_be_read_is_found_by_check(tmp_path):
    from reward_model.commands.check import main

    good = write(tmp_path / "good.jsonl", pairs("a", None, None))
    words = ["--model_name_or_path", "owner/model", "--data_path", good, "--eval_data_path", f"chat={good}"]
    assert main(words) == 0
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "chosen": "", "rejected": "x"}\n')
    with pytest.raises(UserError, match="chosen is empty"):
        main([*words, f"code={tmp_path / 'bad.jsonl'}"])
