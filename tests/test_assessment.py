# SPDX-License-Identifier: Apache-2.0
"""What is said of scores: intervals, calibration and temperature, baselines, lists, subsets, and what is compared."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from reward_model.data.comparisons import Origins
from reward_model.evaluation.assessment import assess
from reward_model.evaluation.baselines import baselines
from reward_model.evaluation.calibration import (
    MOST_CHANGE,
    STEEPEST,
    calibration,
    doubt_temperature,
    interval_of,
    temperature_of,
    tempered,
)
from reward_model.evaluation.intervals import FEW_PROMPTS, auroc, difference, share
from reward_model.evaluation.judged import Judged
from reward_model.evaluation.list_metrics import list_metrics, ndcg, specificity
from reward_model.evaluation.words import compared_lines, lines_of
from reward_model.training.held_out import keep_temperature


def judged(scores, prompts=None, lengths=None, subsets=None, margins=None):
    """Rows of two answers, of which the first is the better one; scores (p, 2)."""
    scores = np.asarray(scores, float)
    count = len(scores)
    numbers = np.arange(2 * count).reshape(count, 2)
    return Judged(
        prompts=np.arange(count) if prompts is None else np.asarray(prompts),
        subsets=np.array([""] * count if subsets is None else subsets, dtype=np.str_),
        rows=np.repeat(np.arange(count), 2),
        scores=scores.ravel(),
        lengths=np.ones(2 * count, int) if lengths is None else np.asarray(lengths).ravel(),
        ranks=np.tile([0, 1], count),
        targets=np.full(2 * count, np.nan),
        better=numbers[:, 0],
        worse=numbers[:, 1],
        margins=np.full(count, np.nan) if margins is None else np.asarray(margins, float),
        data=SimpleNamespace(origins=Origins.of("rows.jsonl", np.arange(1, count + 1))),
    )


def lists(scores, ranks, targets=None):
    """Rows of several answers each."""
    count = len(scores)
    sizes = [len(row) for row in scores]
    nothing = [[np.nan] * size for size in sizes]
    return Judged(
        prompts=np.arange(count),
        subsets=np.array([""] * count, dtype=np.str_),
        rows=np.repeat(np.arange(count), sizes),
        scores=np.concatenate([np.asarray(row, float) for row in scores]),
        lengths=np.ones(sum(sizes), int),
        ranks=np.concatenate([np.asarray(row, int) for row in ranks]),
        targets=np.concatenate([np.asarray(row, float) for row in targets or nothing]),
        better=np.zeros(0, int),
        worse=np.zeros(0, int),
        margins=np.zeros(0),
        data=SimpleNamespace(origins=Origins.of("rows.jsonl", np.arange(1, count + 1))),
    )


# --- how sure an accuracy is ---


def test_the_interval_of_pairs_that_share_prompts_is_that_of_prompts():
    """A hundred prompts with ten pairs each, all right or all wrong: a hundred draws, not a thousand."""
    right = np.repeat([1.0, 0.0], [600, 400])
    shared, alone = share(right, np.repeat(np.arange(100), 10)), share(right, np.arange(1000))
    assert shared.value == alone.value == 0.6 and shared.pairs == 1000
    assert shared.high - shared.low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 100), rel=0.1)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 1000), rel=0.1)


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    chance = np.random.default_rng(3)
    inside = 0
    for draw in range(200):
        sizes = chance.integers(1, 6, 60)
        of_prompt = chance.beta(4, 2, 60)  # mean 2/3
        right = np.concatenate([chance.random(size) < p for size, p in zip(sizes, of_prompt)]).astype(float)
        found = share(right, np.repeat(np.arange(60), sizes), seed=draw)
        inside += found.low <= 2 / 3 <= found.high
    assert 180 <= inside <= 199  # 190 are meant


def test_many_prompts_have_the_normal_interval_and_it_is_the_bootstraps(monkeypatch):
    chance = np.random.default_rng(5)
    right, prompts = (chance.random(6_000) < 0.7).astype(float), chance.integers(0, 2_000, 6_000)
    slow = share(right, prompts)
    monkeypatch.setattr("reward_model.evaluation.intervals.FEW_PROMPTS", 100)
    fast = share(right, prompts)
    assert FEW_PROMPTS > 2_000
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=1e-3)


def test_all_right_is_no_certainty_and_one_prompt_no_interval():
    every = share(np.ones(30), np.arange(30))
    assert every.value == every.high == 1.0
    assert every.low == pytest.approx(0.025 ** (1 / 30))  # Clopper and Pearson, 30 of 30
    assert share(np.ones(30), np.zeros(30)).low is None
    assert share(np.tile([0.0, 1.0], 90), np.arange(180) % 9).low is None  # nine prompts
    assert math.isnan(share(np.zeros(0), np.zeros(0)).value)


def test_an_area_by_hand_and_its_interval_is_that_of_the_bootstrap_by_prompt():
    values, wanted = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([True, False, True, False, False])
    found = auroc(values, wanted, np.arange(5))
    assert (found.value, found.low) == (pytest.approx(5.5 / 6), None)  # one tie
    chance = np.random.default_rng(8)
    prompts = np.repeat(np.arange(150), 8)
    of_prompt = chance.normal(0, 1, 150)[prompts]  # pairs of a prompt are alike in both
    values = of_prompt + chance.normal(0, 0.5, 1_200)
    wanted = of_prompt + chance.normal(0, 2, 1_200) > 0.8
    found = auroc(values, wanted, prompts)
    drawn = []
    for _ in range(400):
        rows = np.concatenate([np.arange(8 * p, 8 * p + 8) for p in chance.integers(0, 150, 150)])
        drawn.append(auroc(values[rows], wanted[rows], np.arange(1_200)).value)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.15)
    alone = auroc(values, wanted, np.arange(1_200))
    assert alone.value == found.value and alone.high - alone.low < 0.9 * (found.high - found.low)


def test_mcnemar_counts_what_one_model_alone_has_right():
    one = np.array([1, 1, 1, 1, 1, 1, 0, 0.5, 1, 1, 0, 0])
    other = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    found = difference(one, other, np.arange(12))
    assert (found.only_one, found.only_other) == (5, 2)  # a tie counts as wrong there
    assert found.p_value == pytest.approx(2 * sum(math.comb(7, k) for k in range(3)) / 2**7)
    assert found.value == pytest.approx((5 - 1 - 0.5) / 12)
    assert found.low < found.value < found.high
    same = difference(one, one, np.arange(12))
    assert (same.p_value, same.value, same.low) == (1.0, 0.0, None)


# --- calibration ---


def test_calibration_by_hand():
    """σ(ln 4) = 0.8: four right of five; σ(ln 1.5) = 0.6: one right of two."""
    gaps = np.array([math.log(4)] * 4 + [-math.log(4)] + [math.log(1.5), -math.log(1.5)])
    found = calibration(gaps)
    assert [(b.pairs, round(b.confidence, 6), b.right) for b in found.bins] == [(2, 0.6, 0.5), (5, 0.8, 0.8)]
    assert found.ece == pytest.approx(2 / 7 * 0.1) and found.mce == pytest.approx(0.1)
    assert found.brier == pytest.approx((4 * 0.2**2 + 0.8**2 + 0.4**2 + 0.6**2) / 7)
    assert found.log_loss == pytest.approx(-(4 * math.log(0.8) + math.log(0.2) + math.log(0.6) + math.log(0.4)) / 7)


@pytest.mark.parametrize("scale", [0.02, 1.0, 7.0])
def test_a_temperature_gives_a_scale_back(scale):
    """Gaps are drawn so that σ(gap) is the truth, and then scaled."""
    chance = np.random.default_rng(1)
    truth = chance.normal(0, 2, 20_000)
    gaps = scale * np.where(chance.random(20_000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    assert temperature_of(gaps) == pytest.approx(scale, rel=0.05)
    found = tempered(gaps, np.arange(20_000))
    assert found.temperature == pytest.approx(scale, rel=0.05)
    assert found.tempered.ece < 0.015
    assert found.raw.ece == pytest.approx(calibration(gaps).ece)
    assert scale == 1.0 or found.raw.ece > 0.04


def gaps_of_prompts(count, each=3, seed=1):
    """Pairs of as many prompts, right with probability σ(gap); those of a prompt are alike."""
    chance = np.random.default_rng(seed)
    truth = np.repeat(chance.normal(0, 2, count), each)
    right = np.repeat(chance.random(count), each) < 1 / (1 + np.exp(-truth))
    return np.where(right, truth, -truth), np.repeat(np.arange(count), each)


def test_the_interval_of_a_temperature_is_that_of_the_bootstrap_by_prompt():
    gaps, prompts = gaps_of_prompts(300)
    temperature = temperature_of(gaps)
    low, high = interval_of(temperature, gaps, prompts)
    chance, by_prompt = np.random.default_rng(0), gaps.reshape(300, 3)
    drawn = [temperature_of(by_prompt[chance.integers(300, size=300)].ravel()) for _ in range(300)]
    assert np.log([low, high]) == pytest.approx(np.log(np.quantile(drawn, [0.025, 0.975])), abs=0.06)
    assert high / temperature == pytest.approx(temperature / low)
    alone = interval_of(temperature, gaps, np.arange(len(gaps)))  # as if each pair were a draw of its own
    assert np.log(high / low) > 1.5 * np.log(alone[1] / alone[0])
    assert interval_of(temperature, gaps, prompts % 9) is None  # too few prompts


def test_a_temperature_of_few_pairs_is_doubted():
    """An end of the interval that moves a probability by more than 0.05 is one too far."""
    x = np.linspace(0, 20, 200_001)
    assert max(x * np.exp(-x) / (1 + np.exp(-x)) ** 2) == pytest.approx(STEEPEST, abs=1e-4)
    said = {}
    for count in (60, 3_000):
        gaps, _ = gaps_of_prompts(count, each=1)
        found = assess(judged(np.stack([gaps, np.zeros(count)], 1)))
        fitted = found["calibration"]
        interval = fitted["temperature_low"], fitted["temperature_high"]
        of_end = 1 / (1 + np.exp(-x / interval[1])) - 1 / (1 + np.exp(-x / fitted["temperature"]))
        said[count] = doubt_temperature(fitted["temperature"], interval, count)
        assert bool(said[count]) == (np.abs(of_end).max() > MOST_CHANGE)
        assert any(said[count] in line for line in lines_of(found | {"model": "m", "data": ["d"]})) or not said[count]
    assert said[3_000] == ""
    assert said[60].startswith("the temperature is rough, 0.")
    assert "fewer than 10 prompts" in doubt_temperature(1.0, None, 40)


def test_a_run_says_how_sure_its_temperature_is(caplog):
    few_wrong = np.concatenate([np.linspace(0.05, 3, 58), [-0.01, -0.3]]) / 5
    for count, saved, said in (
        (3_000, True, ""),
        (60, True, "score_temperature: the temperature is rough, "),
        (few_wrong, False, "no score_temperature is saved: the temperature is rough, "),
        (12, False, "no temperature could be tried on 12 held-out pairs: each half of the prompts has to have 20"),
    ):
        gaps = count if isinstance(count, np.ndarray) else gaps_of_prompts(count, each=1)[0]
        config = SimpleNamespace()
        last = SimpleNamespace(judged=judged(np.stack([5 * gaps, np.zeros(len(gaps))], 1)))
        forward, training = SimpleNamespace(scorer=SimpleNamespace(config=config)), SimpleNamespace(seed=1)
        settings = SimpleNamespace(training=training)
        caplog.clear()
        with caplog.at_level("INFO"):
            keep_temperature(SimpleNamespace(last=last, forward=forward, settings=settings))
        assert hasattr(config, "score_temperature") is saved
        assert said in caplog.text
        assert ("is rough" in caplog.text) is ("is rough" in said)
        if saved:  # and evaluate says so of the saved model, on whatever data
            assert config.score_temperature_fit["pairs"] == count
            gaps, _ = gaps_of_prompts(3_000, each=1, seed=2)
            found = assess(judged(np.stack([gaps, np.zeros(3_000)], 1)), stored=config.score_temperature)
            found["calibration"]["stored_fit"] = config.score_temperature_fit
            lines = "\n".join(lines_of(found | {"model": "m", "data": ["d"]}))
            doubt = "as the model is saved: the temperature is rough"
            assert (doubt in lines) is bool(said)


def test_no_temperature_where_none_is_best():
    assert temperature_of(np.full(100, 0.5)) is None  # all right: the smaller the better
    assert temperature_of(np.array([1.0] * 10 + [-1.0] * 90)) is None  # worse than chance: the larger the better
    assert temperature_of(np.zeros(100)) is None
    assert temperature_of(np.array([1.0, -1.0, 2.0])) is None  # too few
    assert tempered(np.array([1.0] * 50 + [-1.0]), np.zeros(51)) is None  # one prompt has no other half


# --- baselines ---


def test_the_bag_of_words_finds_a_word_and_the_length_baseline_the_length():
    chance = np.random.default_rng(2)
    rows = 300
    texts, lengths = [], []
    for _ in range(rows):  # the better answer has token 7, the worse token 8, and is the longer one in two thirds
        sizes = sorted(chance.integers(3, 30, 2), reverse=chance.random() < 2 / 3)
        texts += [[token, *chance.integers(10, 40, size).tolist()] for token, size in zip((7, 8), sizes)]
        lengths.append([len(text) for text in texts[-2:]])
    found = baselines(judged(np.zeros((rows, 2)), lengths=lengths), texts)
    assert found["a bag of words"].value > 0.97
    assert found["the longer answer"].value == pytest.approx(2 / 3, abs=0.08)
    assert list(found) == ["the longer answer", "a bag of words", "words and length"]
    only_length = baselines(judged(np.zeros((rows, 2)), lengths=lengths), None)
    assert list(only_length) == ["the longer answer"]


def test_words_that_mean_nothing_are_found_to_mean_nothing():
    chance = np.random.default_rng(4)
    texts = [chance.integers(0, 50, 20).tolist() for _ in range(800)]
    found = baselines(judged(np.zeros((400, 2))), texts)
    assert found["a bag of words"].low < 0.5 < found["a bag of words"].high


# --- lists, and answers held equal ---


def test_lists_by_hand():
    found = list_metrics(lists([[3, 2, 1], [1, 2, 3]], [[0, 1, 2], [0, 1, 1]], [[9.0, 5.0, 1.0], [4.0, 1.0, 1.0]]))
    assert found["lists"] == 2 and found["best_of"] == 0.5
    assert found["regret"] == (0 + 3) / 2
    expected = stats.kendalltau([1, 2, 3], [0, -1, -1]).statistic
    assert found["kendall"] == pytest.approx((1 + expected) / 2)
    discounts = 1 / np.log2([2, 3, 4])
    gains = np.array([2, 1, 1])
    assert found["ndcg"] == pytest.approx((1 + gains[[2, 1, 0]] @ discounts / (gains @ discounts)) / 2)


def test_tied_scores_share_their_places():
    assert list_metrics(lists([[2, 2, 1]], [[0, 1, 2]]))["best_of"] == 0.5
    discounts = 1 / np.log2([2, 3, 4])
    tied = (1.5 * (discounts[0] + discounts[1])) / (2 * discounts[0] + discounts[1])
    assert ndcg(np.array([2.0, 2.0, 1.0]), np.array([2.0, 1.0, 0.0])) == pytest.approx(tied)
    assert list_metrics(lists([[1, 1, 1]], [[0, 1, 2]]))["kendall"] == 0.0


def test_pairs_and_lists_without_an_order_are_no_lists():
    assert list_metrics(judged([[1, 2]])) == {}
    assert list_metrics(lists([[1, 2, 3]], [[0, 0, 0]])) == {}


def test_specificity_is_the_spread_within_what_is_held_equal():
    found = specificity(lists([[1, 3, 10], [0, 0, 5]], [[0, 0, 1], [0, 0, 1]]))
    assert found["groups"] == 2
    assert found["spread"] == pytest.approx(math.sqrt((1 + 1 + 0 + 0) / 2))
    assert found["share"] == pytest.approx(found["spread"] / np.std([1, 3, 10, 0, 0, 5]))
    assert specificity(judged([[1, 2]])) == {}


# --- all of it ---


def test_an_assessment_has_what_the_data_have():
    chance = np.random.default_rng(0)
    truth = chance.normal(1, 1, 200)
    scores = np.stack([truth, np.zeros(200)], 1)
    subsets, margins = ["a", "a", "b", ""] * 50, np.tile([1.0, 2.0], 100)
    found = assess(judged(scores, np.arange(200) // 2, np.tile([5, 3], (200, 1)), subsets, margins), [[1], [2]] * 200)
    assert (found["rows"], found["pairs"], found["answers"], found["prompts"]) == (200, 200, 400, 100)
    assert found["accuracy"]["value"] == np.mean(truth > 0) and found["accuracy"]["ties"] == 0
    assert [part["subset"] for part in found["by_subset"]] == ["a", "", "b"]
    assert [part["pairs"] for part in found["by_subset"]] == [100, 50, 50]
    assert sum(part["pairs"] * part["value"] for part in found["by_subset"]) == pytest.approx(np.sum(truth > 0))
    assert [(b["low"], b["high"], b["pairs"]) for b in found["by_margin"]] == [(1.0, 1.0, 100), (2.0, 2.0, 100)]
    assert found["length"]["longer_wins"] == 1.0 and "shorter_is_better" not in found["length"]
    assert sum(found["histogram"]["chosen"]) == sum(found["gaps"]["counts"]) == 200
    assert "lists" not in found and "points" not in found and "specificity" not in found
    assert set(found["scatter"]["side"]) == {"chosen", "rejected"}
    text = "\n".join(lines_of(found | {"model": "m", "data": ["d.jsonl"]}))
    assert f"accuracy      {np.mean(truth > 0):.4f} [" in text and "subset (none)" in text


def test_margins_of_many_values_are_taken_in_fifths():
    margins = np.arange(100.0)
    found = assess(judged(np.stack([margins - 50, np.zeros(100)], 1), margins=margins))["by_margin"]
    assert [b["pairs"] for b in found] == [20] * 5
    assert [b["value"] for b in found] == [0.0, 0.0, pytest.approx((9 + 0.5) / 20), 1.0, 1.0]


def test_a_stored_temperature_is_looked_at():
    chance = np.random.default_rng(7)
    truth = chance.normal(0, 2, 2_000)
    gaps = 5 * np.where(chance.random(2_000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    found = assess(judged(np.stack([gaps, np.zeros(2_000)], 1)), stored=5.0)["calibration"]
    assert found["stored_temperature"] == 5.0
    assert found["stored"]["ece"] < 0.05 < found["raw"]["ece"]
    assert found["stored"]["ece"] == pytest.approx(calibration(gaps / 5).ece)


def test_answers_with_targets_alone():
    found = assess(lists([[1], [2], [3]], [[0], [0], [0]], [[1.0], [3.0], [2.0]]))
    assert found["points"] == {"answers": 3, "pearson": pytest.approx(0.5), "spearman": pytest.approx(0.5)}
    assert found["pairs"] == 0 and "accuracy" not in found
    assert "targets" in "\n".join(lines_of(found | {"model": "m", "data": ["d.jsonl"]}))


def test_a_comparison_in_words():
    found = {"one": "a", "other": "b", "value": -0.1, "low": -0.2, "high": 0.05, "p_value": 0.25}
    lines = list(compared_lines(found | {"only_one": 1, "only_other": 4}))
    assert lines[0] == "a against b: -0.1000 [-0.2000, +0.0500] accuracy"
    assert "p = 0.25; 1 right by the first alone, 4 by the second alone" in lines[1]
