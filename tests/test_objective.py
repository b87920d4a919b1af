# SPDX-License-Identifier: Apache-2.0
"""What a row needs for the losses that the flags name, what the training rows do, and the loss of a batch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flags import loss_of

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.batching.merging import merge
from reward_model.common.errors import UserError
from reward_model.config.objectives import LIST_LOSSES, PAIR_LOSSES, POINT_LOSSES, kind_of
from reward_model.data.comparisons import BadRow, Comparison
from reward_model.data.rows import judge_answer, judge_list, judge_pair
from reward_model.objectives.losses import length_penalty
from reward_model.objectives.objective import MOST_GRADES, Objective
from reward_model.reward_model import SCORE_PENALTIES, log_barrier, score_penalty


def objective(flags=""):
    return Objective(loss_of(flags))


# Section 1: what rows need.


def pair(**row):
    return Comparison([], [], **judge_pair(row))


def ranked(*scores, ranks=None):
    """A list; of scores alone unless there are ranks."""
    return Comparison([], [], **judge_list(len(ranks or scores), list(scores) or None, ranks))


def unordered(count):
    return Comparison([], [], **judge_list(count))


def single(**row):
    return Comparison([], [], **judge_answer(row))


PAIR, RANKED, SINGLE = pair(), ranked(ranks=[2, 1, 3]), single(score=1)
NO_TARGET = "needs a score or label, and the row has none"


def no_rating(margin):
    words = "significantly better, better, slightly better, negligibly better, unsure"
    return f"the row has no rating that --margin {margin} knows: 0 to 3, or {words}"


def test_every_loss_is_of_one_kind():
    kinds = {name: kind_of(name) for name in (*PAIR_LOSSES, *LIST_LOSSES, *POINT_LOSSES)}
    assert [*kinds.values()] == ["pairs"] * 7 + ["lists"] * 3 + ["points"] * 5
    assert (kinds["logistic"], kinds["rank_list"], kinds["ordinal"]) == ("pairs", "lists", "points")


@pytest.mark.parametrize(
    "flags, kinds, by_row",
    [
        ("", {"logistic": "pairs"}, False),
        ("--loss rank_list", {"rank_list": "lists"}, True),
        ("--loss bce pairwise", {"bce": "points", "logistic": "pairs"}, True),
    ],
)
def test_one_loss_of_pairs_counts_pairs_and_any_other_choice_rows(flags, kinds, by_row):
    assert objective(flags).kinds == kinds
    assert objective(flags).by_row is by_row


ENOUGH = [
    ("", [PAIR, RANKED, ranked(1.0, 2.0), ranked(1.0, 1.0, 2.0)]),  # an untied pair is enough
    ("--margin column", [pair(margin=0), pair(chosen_score=3, rejected_score=1), ranked(1.0, 2.0)]),
    ("--margin large", [pair(rating="unsure")]),
    ("--loss scaled --margin small", [pair(rating=3)]),
    ("--loss scaled --margin column", [pair(margin=0), ranked(1.0, 3.0)]),
    ("--loss hinge", [PAIR]),  # its margin is a number
    ("--label_smoothing column", [pair(probability=0)]),
    ("--margin strength --label_smoothing strength", [pair(strength_mean=-2), pair(strength_mean="0.5")]),
    ("--loss rank_list", [PAIR, RANKED, ranked(1.0, 1.0, 2.0)]),
    ("--loss plackett_luce", [PAIR, RANKED]),
    ("--loss best_of_k", [PAIR, RANKED, ranked(1.0, 1.0, 2.0)]),  # the best is one; others may be tied
    ("--loss mse", [SINGLE, pair(chosen_score=2), ranked(1.0, 1.0), ranked(5.0)]),
    ("--loss bce", [single(label=True), single(label=0), single(score=0.5)]),
    ("--loss ordinal", [single(label=-2), ranked(1.0, 3.0)]),
    ("--loss logistic mse", [PAIR, RANKED, SINGLE, ranked(1.0, 1.0), pair(chosen_score=1, rejected_score=0)]),
    ("--loss plackett_luce bce", [RANKED, single(label=1)]),
    ("--loss logistic rank_list mse", [PAIR, RANKED, SINGLE]),
]


@pytest.mark.parametrize("flags, row", [(flags, row) for flags, rows in ENOUGH for row in rows])
def test_a_row_with_what_one_of_the_losses_needs_lacks_nothing(flags, row):
    assert objective(flags).missing(row) is None


PREFERRED = "needs a preferred answer, and the row has"
LISTS = "needs ranked lists, and the row has"
SCORED = "; --loss bce learns from labels, --loss mse from scores"
JUDGED = "; --loss logistic learns from pairs"
LACKING = [
    ("", SINGLE, f"--loss logistic {PREFERRED} one answer{SCORED}"),
    ("", ranked(3.0), f"--loss logistic {PREFERRED} one answer{SCORED}"),
    ("--loss focal", unordered(2), f"--loss focal {PREFERRED} two answers and no order (scores or ranks)"),
    ("--loss hinge", unordered(12), f"--loss hinge {PREFERRED} 12 answers and no order (scores or ranks)"),
    ("", ranked(2.0, 2.0, 2.0), f"--loss logistic {PREFERRED} three answers that are all tied"),
    ("--margin column", SINGLE, f"--loss logistic {PREFERRED} one answer{SCORED}"),
    ("--loss plackett_luce", unordered(2), f"--loss plackett_luce {LISTS} two answers and no order (scores or ranks)"),
    ("--loss rank_list", ranked(ranks=[1, 1, 1, 1]), f"--loss rank_list {LISTS} four answers that are all tied"),
    ("--loss best_of_k", SINGLE, f"--loss best_of_k {LISTS} one answer{SCORED}"),
    ("--loss best_of_k", ranked(ranks=[1]), f"--loss best_of_k {LISTS} one answer"),
    ("--loss mse", PAIR, f"--loss mse {NO_TARGET}{JUDGED}"),
    ("--loss ordinal", RANKED, f"--loss ordinal {NO_TARGET}{JUDGED}"),
    ("--loss bce", single(), f"--loss bce {NO_TARGET}"),
    ("--loss logistic mse", single(), f"--loss logistic {PREFERRED} one answer and --loss mse {NO_TARGET}"),
    ("--loss bce rank_list", unordered(3),
     f"--loss bce {NO_TARGET} and --loss rank_list {LISTS} three answers and no order (scores or ranks)"),
]  # fmt: skip


@pytest.mark.parametrize("flags, row, reason", LACKING)
def test_a_row_with_nothing_to_learn_from_says_what_it_lacks(flags, row, reason):
    assert objective(flags).missing(row) == reason


NO_STRENGTH = "the row has no finite strength_mean (reward-model ensemble writes it)"
WRONG = [
    ("--margin column", PAIR, "margin is missing, and --margin column needs one, or two scores"),
    ("--margin column", RANKED, "margin is missing, and --margin column needs one, or two scores"),
    ("--margin small", pair(margin=1), no_rating("small")),
    ("--margin strength", pair(margin=1, strength_std=2), f"{NO_STRENGTH}, and --margin strength needs one"),
    ("--margin strength", pair(strength_mean=math.inf), f"{NO_STRENGTH}, and --margin strength needs one"),
    ("--label_smoothing strength", PAIR, f"{NO_STRENGTH}, and --label_smoothing strength needs one"),
    ("--margin strength", RANKED, "a list has no strength, and --margin strength needs one"),
    ("--loss hinge --margin large", ranked(1.0, 2.0), no_rating("large")),
    ("--loss scaled --margin column", pair(margin=-0.5),
     "margin is -0.5, so that the better answer need not win: give 0 or more"),
    ("--loss scaled --margin column", ranked(1.0, 3.0, ranks=[1, 2]),
     "margin is -2, so that the better answer need not win: give 0 or more"),
    ("--margin column", pair(margin=-7), "margin is -7, so that the better answer need not win: give 0 or more"),
    ("--label_smoothing column", PAIR,
     "the row has no probability from 0 to 1, and --label_smoothing column needs one"),
    ("--loss plackett_luce", ranked(1.0, 3.0, 1.0),
     "responses 1 and 3 are tied, and --loss plackett_luce needs a strict order; rank_list takes ties"),
    ("--loss plackett_luce", ranked(ranks=[1, 2, 3, 3, 3]),
     "responses 3 and 4 are tied, and --loss plackett_luce needs a strict order; rank_list takes ties"),
    ("--loss best_of_k", ranked(1.0, 3.0, 3.0),
     "responses 2 and 3 are both the best, and --loss best_of_k needs one; rank_list takes ties"),
    ("--loss bce", single(score=1.5), "the label 1.5 is not in [0, 1], as --loss bce needs it"),
    ("--loss bce", ranked(0.5, -1.0), "the label -1 is not in [0, 1], as --loss bce needs it"),
    ("--loss ordinal", single(label=2.5), "the label 2.5 is not a whole number, as --loss ordinal needs it"),
    ("--loss ordinal", pair(chosen_score=3, rejected_score=1.5),
     "the label 1.5 is not a whole number, as --loss ordinal needs it"),
    # what suits the one does not excuse what is wrong for the other
    ("--loss logistic bce", pair(chosen_score=7, rejected_score=1),
     "the label 7 is not in [0, 1], as --loss bce needs it"),
    ("--loss logistic mse --margin large", pair(chosen_score=7), no_rating("large")),
    ("--loss mse plackett_luce", ranked(1.0, 1.0, 2.0),
     "responses 1 and 2 are tied, and --loss plackett_luce needs a strict order; rank_list takes ties"),
]  # fmt: skip


@pytest.mark.parametrize("flags, row, reason", WRONG)
def test_what_does_not_suit_the_loss_is_refused(flags, row, reason):
    with pytest.raises(BadRow) as caught:
        objective(flags).missing(row)
    assert str(caught.value) == reason


def rows(*judged):
    """As much of Comparisons as is asked for."""
    targets = np.array([target for row in judged for target in row.targets])
    return SimpleNamespace(pairs=np.array([len(row.better) for row in judged]), targets=lambda: targets)


@pytest.mark.parametrize(
    "flags, judged, reason",
    [
        ("--loss logistic mse", [PAIR, RANKED], "--loss mse has nothing to learn from: no training row has a score or"),
        ("--loss logistic mse", [SINGLE], "--loss logistic has nothing to learn from: no training row has an order"),
        ("--loss bce rank_list", [SINGLE], "--loss rank_list has nothing to learn from: no training row has an order"),
    ],
)
def test_each_loss_needs_a_row(flags, judged, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        objective(flags).require_rows(rows(*judged))
    objective(flags).require_rows(rows(*judged, PAIR, SINGLE))


@pytest.mark.parametrize("flags", ["", "--loss rank_list", "--loss logistic bce"])
def test_only_ordinal_has_thresholds(flags):
    assert objective(flags).start_thresholds(rows(PAIR, SINGLE)) is None


def test_thresholds_begin_at_the_frequencies_of_the_grades():
    """Grades −1, 0, 1, 2 occur 3, 1, 0, 1 times: with half a row more each, 3.5, 1.5, 0.5, 1.5 of 7."""
    judged = [single(label=-1), PAIR, ranked(-1.0, 2.0), single(label=0), pair(score_chosen=-1), RANKED]
    made = objective("--loss ordinal")
    thresholds = made.start_thresholds(rows(*judged))
    above = [3.5 / 7, 2 / 7, 1.5 / 7]  # shares of the rows above each threshold
    expected = torch.tensor([-math.log(share / (1 - share)) for share in above])
    torch.testing.assert_close(thresholds, expected)
    assert made.lowest_grade == -1


@pytest.mark.parametrize("labels, count", [([3, 3], 1), ([0, MOST_GRADES], MOST_GRADES + 1)])
def test_one_grade_or_too_many_are_refused(labels, count):
    with pytest.raises(UserError, match=f"--loss ordinal: the labels span {count} grades; 2 to 1000"):
        objective("--loss ordinal").start_thresholds(rows(*[single(label=label) for label in labels]))


def test_two_grades_and_the_most_are_told_apart():
    for last in (1, MOST_GRADES - 1):
        assert len(objective("--loss ordinal").start_thresholds(rows(single(label=0), single(label=last)))) == last


# Section 2: the loss of a batch against a loop over its rows.

PAD = 0


def logistic(gap):
    return math.log1p(math.exp(-gap))


def cosine_bound(cosine):
    return 20 / ((math.pi - math.acos(min(max(cosine, 0), 1))) / math.pi + 0.001) - 15


def focal(gap):
    return (1 - 2 * max(0, 1 / (1 + math.exp(-gap)) - 0.5)) ** 2 * logistic(gap)


def soft(gap, strength):
    probability = 1 / (1 + math.exp(-strength)) if strength < 0 else 1
    return probability * logistic(gap) + (1 - probability) * logistic(-gap)


# flags of pairs: the loss of a pair (chosen c, rejected r) that is number i of its row
PAIR_REFERENCES = {
    "": lambda c, r, row, i: logistic(c - r),
    "--loss log_exp": lambda c, r, row, i: math.log(1 + math.exp(r - c)),
    "--margin 0.5 --label_smoothing 0.1": lambda c, r, row, i: (
        0.9 * logistic(c - r - 0.5) + 0.1 * logistic(r - c + 0.5)
    ),
    "--margin column": lambda c, r, row, i: logistic(c - r - row.margin[i]),
    "--margin large": lambda c, r, row, i: logistic(c - r - row.rating[i]),
    "--margin small": lambda c, r, row, i: logistic(c - r - row.rating[i] / 3),
    "--label_smoothing column": lambda c, r, row, i: (
        row.probability[i] * logistic(c - r) + (1 - row.probability[i]) * logistic(r - c)
    ),
    "--margin strength": lambda c, r, row, i: logistic(c - r - row.strength[i]),
    "--label_smoothing strength": lambda c, r, row, i: soft(c - r, row.strength[i]),
    "--margin strength --label_smoothing strength": lambda c, r, row, i: soft(c - r - row.strength[i], row.strength[i]),
    "--loss hinge --margin strength": lambda c, r, row, i: max(0, row.strength[i] - c + r),
    "--loss scaled --margin large": lambda c, r, row, i: row.rating[i] * logistic(c - r),
    "--loss hinge": lambda c, r, row, i: max(0, 1 - c + r),
    "--loss hinge --margin column": lambda c, r, row, i: max(0, row.margin[i] - c + r),
    "--loss focal": lambda c, r, row, i: focal(c - r),
    "--loss direct": lambda c, r, row, i: logistic(c - r) + logistic(c) + logistic(-r),
    "--loss prior_cosine --prior_model none": lambda c, r, row, i: (
        logistic(c - r) + logistic(cosine_bound(row.similarity[i]) - c + r)
    ),
}


def plackett_luce(found, ranks):
    order = [score for _, score in sorted(zip(ranks, found))]
    return sum(math.log(sum(map(math.exp, order[i:]))) - score for i, score in enumerate(order))


def rank_list(found, ranks):
    return np.mean([logistic(a - b) for a, i in zip(found, ranks) for b, j in zip(found, ranks) if i < j])


LIST_REFERENCES = {
    "rank_list": rank_list,
    "plackett_luce": plackett_luce,
    "best_of_k": lambda found, ranks: math.log(sum(map(math.exp, found))) - found[ranks.index(0)],
}
POINT_REFERENCES = {
    "mse": lambda score, target: (score - target) ** 2,
    "mae": lambda score, target: abs(score - target),
    "huber": lambda score, target: (score - target) ** 2 / 2 if abs(score - target) < 1 else abs(score - target) - 0.5,
    "bce": lambda score, target: target * logistic(score) + (1 - target) * logistic(-score),
}


def draw_rows(seed=0, kinds=("pair", "list", "single"), count=9):
    """Rows of two prompts and few texts, so that they merge and a text comes in several of them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        kind, prompt = kinds[i % len(kinds)], int(rng.integers(2))
        size = {"pair": 2, "list": int(rng.integers(3, 6)), "single": 1}[kind]
        texts = [[3 + int(k), *([9] * int(k % 3)), 8] for k in rng.choice(6, size, replace=False)]
        judged = {
            "pair": judge_pair({"margin": float(rng.normal()), "rating": int(rng.integers(4)), "probability": 0.75})
            | {"strength": [(-1) ** i * (i + 0.25)]},
            "list": judge_list(size, rng.random(size).round(2).tolist()),
            "single": judge_answer({"score": float(rng.integers(2))}),
        }[kind]
        similarity = rng.uniform(-1, 1, len(judged["better"])).tolist()
        made.append(Comparison([1 + prompt, 7], texts, prompt_hash=prompt, similarity=similarity, **judged))
    return made


def collated(made, layout, row_weights=None):
    """A batch, a score for each of its responses, and for each row the scores of its own."""
    batch = collate(made, layout, row_weights=row_weights)
    texts = [(*m.texts.prompt, *response) for m in merge(made, layout) for response in m.texts.responses]
    rng = np.random.default_rng(1)
    value = {text: float(v) for text, v in zip(sorted(set(texts)), rng.normal(0, 1.5, len(texts)))}
    scores = torch.tensor([value[text] for text in texts], requires_grad=True)
    return batch, scores, [[value[(*row.prompt, *response)] for response in row.responses] for row in made]


def shares(made, by_row, row_weights):
    sizes = row_weights if row_weights is not None else [1.0 if by_row else len(row.better) for row in made]
    return [size / sum(sizes) for size in sizes]


LAYOUTS = [Layout(kind, PAD) for kind in ("packed", "shared", "separate", "unpadded")]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)


@layouts
@pytest.mark.parametrize("flags", PAIR_REFERENCES)
def test_losses_of_pairs(flags, layout):
    made = draw_rows(kinds=("pair",))
    batch, scores, own = collated(made, layout)
    expected = np.mean([PAIR_REFERENCES[flags](*found, row, 0) for row, found in zip(made, own)])
    assert objective(flags)(batch, scores).item() == pytest.approx(expected, rel=1e-5)


@layouts
def test_the_length_prior_compares_what_is_divergent(layout):
    # after two tokens in common: 1 and 3 tokens; 2 and 4
    made = [
        Comparison([1], [[5, 6, 8], [5, 6, 9, 9, 8]], prompt_hash=0, **judge_pair({})),
        Comparison([1], [[4, 8], [3, 9, 9, 8]], prompt_hash=1, **judge_pair({})),
    ]
    batch, scores, own = collated(made, layout)
    bounds = [10 / (1 / 3 + 0.001) - 5, 10 / (2 / 4 + 0.001) - 5]
    expected = np.mean([logistic(c - r) + logistic(bound - c + r) for (c, r), bound in zip(own, bounds)])
    loss = objective("--loss prior_length --prior_beta 10 -5")(batch, scores)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@layouts
@pytest.mark.parametrize("name", LIST_REFERENCES)
def test_losses_of_lists(name, layout):
    """Pairs are lists of two."""
    made = draw_rows(kinds=("list", "pair"))
    batch, scores, own = collated(made, layout, row_weights=[1.0] * len(made))
    expected = np.mean([LIST_REFERENCES[name](found, row.ranks) for row, found in zip(made, own)])
    assert objective(f"--loss {name}")(batch, scores).item() == pytest.approx(expected, rel=1e-5)


@layouts
@pytest.mark.parametrize("name", POINT_REFERENCES)
def test_losses_of_single_answers(name, layout):
    """An answer that two rows score has two targets."""
    made = draw_rows(kinds=("single",))
    batch, scores, own = collated(made, layout, row_weights=[1.0] * len(made))
    expected = np.mean([POINT_REFERENCES[name](found[0], row.targets[0]) for row, found in zip(made, own)])
    assert objective(f"--loss {name}")(batch, scores).item() == pytest.approx(expected, rel=1e-5)


def test_ordinal_counts_grades_from_the_lowest_of_the_training_rows():
    made = objective("--loss ordinal")
    made.lowest_grade = -1
    row = Comparison([1], [[2]], **judge_answer({"label": 0}))
    batch = collate([row], Layout("packed", PAD))
    # P(grade 1 of 0, 1, 2) = σ(1 − 0) − σ(1 − 2)
    loss = made(batch, torch.tensor([1.0]), thresholds=torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(1))), rel=1e-5)


def test_labels_are_told_by_the_side_of_0_and_grades_by_what_is_likeliest():
    rows = [Comparison([1 + i], [[9]], **judge_answer({"label": label})) for i, label in enumerate((1, 0, 0, 2))]
    batch, scores = collate(rows, Layout("packed", PAD)), torch.tensor([0.1, 0.1, -3.0, 4.0])
    assert objective("--loss bce").right_labels(batch, scores, None).tolist() == [1, 0, 1, 1]
    # P(0), P(1), P(2) at 0.1: 0.27, 0.44, 0.29; at −3: 0.88, …; at 4: …, 0.95
    ordinal = objective("--loss ordinal").right_labels(batch, scores, torch.tensor([-0.9, 1.0]))
    assert ordinal.tolist() == [1, 0, 1, 1]
    assert objective("--loss mse").right_labels(batch, scores, None).isnan().all()


@layouts
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mixture_takes_of_each_row_what_it_has(layout, weighted):
    made = draw_rows()
    given = np.random.default_rng(2).random(len(made)).tolist() if weighted else [1.0] * len(made)
    batch, scores, own = collated(made, layout, given)
    expected = 0.0
    for row, found, share in zip(made, own, shares(made, True, given)):
        pairs = [logistic(found[i] - found[j]) for i, j in zip(row.better, row.worse)]
        points = [abs(s - t) for s, t in zip(found, row.targets) if not math.isnan(t)]
        expected += share * (2 * np.mean(pairs or 0) + 0.25 * np.mean(points or 0))
    flags = "--loss logistic mae --loss_weight 2 0.25"
    assert objective(flags)(batch, scores).item() == pytest.approx(expected, rel=1e-5)


def penalty(kind, own, share):
    """Of rows with such scores and shares."""
    means = [np.mean(found) for found in own]
    if kind == "zero_sum":
        return np.dot(share, means) ** 2
    of_row = {
        "center": lambda found: 4 * np.mean(found) ** 2,
        "l2": lambda found: np.mean(np.square(found)),
        "log_barrier": lambda found: log_barrier(torch.tensor(found)).mean().item(),
    }["center" if kind == "centre" else kind]
    return np.dot(share, [of_row(found) for found in own])


@layouts
@pytest.mark.parametrize("flags", ["", "--loss rank_list", "--loss mse", "--loss logistic mse"])
@pytest.mark.parametrize("kind", SCORE_PENALTIES)
def test_penalties_are_means_over_rows(kind, flags, layout):
    kinds = {"": ("pair", "list"), "--loss rank_list": ("list",), "--loss mse": ("single",)}.get(flags)
    made = draw_rows(kinds=kinds or ("pair", "list", "single"))
    plain = objective(flags)
    given = [1.0] * len(made) if plain.by_row else None
    batch, scores, own = collated(made, layout, given)
    with_penalty = objective(f"{flags} --score_penalty {kind} --score_penalty_weight 0.5")
    added = (with_penalty(batch, scores) - plain(batch, scores)).item()
    assert added == pytest.approx(0.5 * penalty(kind, own, shares(made, plain.by_row, given)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", SCORE_PENALTIES)
def test_penalties_of_pairs_are_the_drop_ins(kind):
    batch, scores, own = collated(draw_rows(kinds=("pair",)), LAYOUTS[0])
    chosen, rejected = torch.tensor(own).T
    added = objective(f"--score_penalty {kind} --score_penalty_weight 1")(batch, scores) - objective()(batch, scores)
    torch.testing.assert_close(added, score_penalty(kind, chosen, rejected))


@layouts
def test_the_length_penalty_sees_each_answer_of_each_row(layout):
    made = draw_rows()
    given = [1.0] * len(made)
    batch, scores, own = collated(made, layout, given)
    flags = "--loss logistic mse"
    added = objective(f"{flags} --length_penalty 2")(batch, scores) - objective(flags)(batch, scores)
    found = [(s, len(t), 1 / len(row.responses)) for row, o in zip(made, own) for s, t in zip(o, row.responses)]
    values, lengths, weights = (torch.tensor(column) for column in zip(*found))
    expected = 2 * length_penalty(values, lengths, weights / weights.sum())
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)


@layouts
@pytest.mark.parametrize("flags", [flags for flags in PAIR_REFERENCES if "probability" not in flags])
def test_losses_per_token(flags, layout):
    """Token i of one answer against token i of the other, from where they differ to the shorter one's end."""
    made = draw_rows(kinds=("pair",))
    batch, _, _ = collated(made, layout)
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(batch.tokens.spans.shape, generator=generator)
    found = objective(f"{flags} --loss_level token")(batch, every[:, -1], every).item()
    order = [i for m in merge(made, layout) for i, _ in m.rows]
    losses = []
    for b, w, start, i in zip(batch.pairs.better, batch.pairs.worse, batch.pairs.start, order):
        end = min(batch.tokens.span_lengths[b], batch.tokens.span_lengths[w])
        tokens = zip(every[b, start:end].tolist(), every[w, start:end].tolist())
        losses.append(np.mean([PAIR_REFERENCES[flags](c, r, made[i], 0) for c, r in tokens]))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("flags", ["", "--loss plackett_luce", "--loss mse", "--loss rank_list mse --length_penalty 1"])
def test_a_batch_without_what_a_loss_learns_from_has_a_gradient_of_zero(flags):
    """A forward pass of a mixture may hold none of it; every rank has to go through backward all the same."""
    bare = Comparison([1], [[2], [3]], targets=[math.nan, math.nan])
    batch = collate([bare], LAYOUTS[0])
    scores = torch.tensor([0.5, -0.5], requires_grad=True)
    loss = objective(flags)(batch, scores)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]
