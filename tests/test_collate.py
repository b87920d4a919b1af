# SPDX-License-Identifier: Apache-2.0
"""Merging and collation against slow references, and the loader."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from comparisons import answer, pair, table

from reward_model.batching.blocks import Blocks
from reward_model.batching.collate import PlannedBatches, collate, loader
from reward_model.batching.groups import single_rows
from reward_model.batching.layout import Layout
from reward_model.batching.merging import MergedComparison, merge
from reward_model.batching.plan import BatchSpec, EpochPlan, MicroBatch
from reward_model.data.comparisons import Comparison
from reward_model.models.attention import block_mask, seen, visibility

pytestmark = pytest.mark.usefixtures("one_thread")

PAD = 9
KINDS = ("packed", "shared", "separate", "unpadded")
WHOLE = ("separate", "unpadded")  # the kinds that share no prompt
FACTS = ("margin", "rating", "probability", "strength", "similarity")
kinds = pytest.mark.parametrize("kind", KINDS)
seeds = pytest.mark.parametrize("seed", range(5))


def ids(rng, low, high):
    """Few of them, so that responses begin alike; the pad id among them."""
    return rng.choice([1, 2, PAD], rng.integers(low, high)).tolist()


def random_comparison(rng, responses):
    """K responses and some of the pairs among them judged."""
    pairs = list(itertools.combinations(range(responses), 2))
    some = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(1, len(pairs) + 1)]]
    better, worse = map(list, zip(*[(a, b) if rng.random() < 0.5 else (b, a) for a, b in some]))
    margin = [float(rng.normal()) if rng.random() < 0.5 else math.nan for _ in some]
    return Comparison(ids(rng, 0, 5), [ids(rng, 1, 7) for _ in range(responses)], better, worse, margin)


def random_comparisons(seed, count=5):
    rng = np.random.default_rng(seed)
    return [random_comparison(rng, int(rng.choice([2, 3, 5]))) for _ in range(count)]


def rows_of_prompts(seed, count=12):
    """Pairs as data.compare writes them, of a few texts of three prompts: many texts come more than once."""
    rng = np.random.default_rng(seed)
    prompts, responses = [[p, 7, *ids(rng, 0, 4)] for p in range(3)], [[k, *ids(rng, 0, 5)] for k in range(4)]
    found = []
    for _ in range(count):
        prompt, (a, b) = int(rng.integers(3)), rng.choice(4, 2, replace=False)
        margin = float(rng.normal()) if rng.random() < 0.5 else math.nan
        found.append(pair(prompts[prompt], responses[a], responses[b], prompt - 1, margin))
    return found


def whole_texts(c):
    return [(*c.prompt, *response) for response in c.responses]


def judged(comparisons):
    """Whole texts of better and worse, and the margin; in the order in which Comparisons list them."""
    for c in comparisons:
        for better, worse, margin in zip(c.better, c.worse, c.margin):
            yield (*c.prompt, *c.responses[better]), (*c.prompt, *c.responses[worse]), str(np.float32(margin))


def tensors(batch):
    """Every tensor of a batch, by its part and name."""
    parts = {name: getattr(batch, name) for name in ("tokens", "pairs", "lists", "points", "blocks")}
    return {f"{name}.{f.name}": getattr(part, f.name) for name, part in parts.items() for f in fields(part)}


def own_tokens(batch):
    """Ids of each response's own tokens."""
    flat = batch.tokens.input_ids.flatten()
    return [flat[at[:n]].tolist() for at, n in zip(batch.tokens.spans, batch.tokens.span_lengths.tolist())]


def texts_in(batch):
    """Each response's whole text, read from what its last token sees."""
    tokens, width = batch.tokens, batch.tokens.input_ids.shape[1]
    visible = seen(tokens).flatten(0, 1)
    return [tuple(tokens.input_ids[end // width][visible[end]].tolist()) for end in tokens.ends.tolist()]


def judged_in(batch):
    texts = texts_in(batch)
    for better, worse, margin in zip(batch.pairs.better.tolist(), batch.pairs.worse.tolist(), batch.pairs.margin):
        yield texts[better], texts[worse], str(np.float32(margin))


def first_difference(first, second):
    """At the latest the shorter one's last."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second)) - 1


def slow_rows(comparisons, kind):
    """Rows of (id, position, comparison, response), and each comparison's sizes."""
    if kind in WHOLE:
        texts = [c.prompt + response for c in comparisons for response in c.responses]
        sizes = [[1, 0, len(text)] for text in texts]
        rows = [[(token, i, n, 1) for i, token in enumerate(text)] for n, text in enumerate(texts)]
        return rows if kind == "separate" else [[token for row in rows for token in row]], sizes
    rows, sizes = [], []
    for n, c in enumerate(comparisons):
        row = [(token, i, n, 0) for i, token in enumerate(c.prompt)]
        for k, response in enumerate(c.responses, 1):
            row += [(token, len(c.prompt) + i, n, k) for i, token in enumerate(response)]
        rows.append(row)
        sizes.append([len(c.responses), len(c.prompt), *map(len, c.responses)])
    return rows if kind == "shared" else [[token for row in rows for token in row]], sizes


@kinds
@seeds
@pytest.mark.parametrize("block", [1, 8])
def test_rows_agree_with_a_slow_reference(kind, seed, block):
    comparisons = random_comparisons(seed)
    batch = collate(comparisons, Layout(kind, PAD, block=block))
    rows, sizes = slow_rows(comparisons, kind)
    width = math.ceil(max(map(len, rows)) / block) * block
    names = ("input_ids", "attention_mask", "position_ids")
    sees = seen(batch.tokens)
    assert {getattr(batch.tokens, name).shape for name in names} == {(len(rows), width)}
    for i, row in enumerate(rows):
        for j in range(width):
            token, position, comparison, response = row[j] if j < len(row) else (PAD, 0, -1, 0)
            expected = token, int(j < len(row)), position
            assert tuple(int(getattr(batch.tokens, name)[i, j]) for name in names) == expected
            before = [c == comparison and k in (0, response) for _, _, c, k in row[: j + 1]]
            expected = before if j < len(row) else [False] * j + [True]
            assert sees[i, j].tolist() == expected + [False] * (width - len(expected))
    assert batch.tokens.sizes.tolist() == [*itertools.chain(*sizes)]


@kinds
@seeds
def test_responses_and_pairs_agree_with_a_slow_reference(kind, seed):
    comparisons = random_comparisons(seed)
    batch = collate(comparisons, Layout(kind, PAD))
    responses = [(c.prompt, response) for c in comparisons for response in c.responses]
    own = [prompt + response if kind in WHOLE else response for prompt, response in responses]
    assert texts_in(batch) == [(*prompt, *response) for prompt, response in responses]
    assert own_tokens(batch) == own
    assert batch.tokens.response_lengths.tolist() == [len(response) for _, response in responses]
    assert batch.tokens.spans.shape == (len(responses), max(map(len, own)))
    for at, length, end in zip(batch.tokens.spans, batch.tokens.span_lengths, batch.tokens.ends):
        assert at[length - 1 :].unique().tolist() == [end]
    assert list(judged_in(batch)) == list(judged(comparisons))
    starts = [first_difference(own[a], own[b]) for a, b in zip(batch.pairs.better.tolist(), batch.pairs.worse.tolist())]
    assert batch.pairs.start.tolist() == starts
    torch.testing.assert_close(batch.pairs.weights, torch.full((len(starts),), 1 / len(starts)))


def test_packed_by_hand():
    comparisons = [pair([1, 2], [3, 4], [5]), pair([6], [7], [8, 8, 8], margin=0.5)]
    batch = collate(comparisons, Layout("packed", PAD, block=4))
    assert batch.tokens.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 8, 8, PAD, PAD]]
    assert batch.tokens.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3, 0, 0]]
    assert batch.tokens.begin.tolist() == [[0, 0, 2, 2, 4, 5, 6, 7, 7, 7, 10, 11]]
    assert batch.tokens.prompt_begin.tolist() == [[0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 0, 0]]
    assert batch.tokens.prompt_end.tolist() == [[0, 0, 2, 2, 2, 0, 6, 6, 6, 6, 0, 0]]
    # blocks of 4 tokens: the second sees both, in part; no block is seen whole
    assert batch.blocks.part_number.tolist() == [[[1, 2, 2]]]
    assert batch.blocks.part[0, 0, 2, :2].tolist() == [1, 2]
    assert batch.blocks.whole_number.tolist() == [[[0, 0, 0]]]
    assert batch.tokens.sizes.tolist() == [2, 2, 2, 1, 2, 1, 1, 3]
    assert batch.tokens.ends.tolist() == [3, 4, 6, 9]
    assert batch.tokens.spans.tolist() == [[2, 3, 3], [4, 4, 4], [6, 6, 6], [7, 8, 9]]
    assert batch.tokens.span_lengths.tolist() == [2, 1, 1, 3]
    assert (batch.pairs.better.tolist(), batch.pairs.worse.tolist()) == ([0, 2], [1, 3])
    assert batch.pairs.start.tolist() == [0, 0]
    assert batch.pairs.margin[0].isnan()
    assert batch.pairs.margin[1] == 0.5


def test_shared_and_separate_by_hand():
    comparisons = [pair([1, 2], [3, 4], [5]), pair([6], [7], [8, 8, 8])]
    shared = collate(comparisons, Layout("shared", PAD))
    assert shared.tokens.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 8, 8]]
    assert shared.tokens.ends.tolist() == [3, 4, 6, 9]
    separate = collate(comparisons, Layout("separate", PAD))
    assert separate.tokens.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, PAD], [6, 7, PAD, PAD], [6, 8, 8, 8]]
    assert separate.tokens.ends.tolist() == [3, 6, 9, 15]
    assert separate.pairs.start.tolist() == [2, 1]
    assert separate.tokens.response_lengths.tolist() == shared.tokens.response_lengths.tolist() == [2, 1, 1, 3]


def test_rows_of_a_multiple_of_tokens():
    rows = [pair([1, 2], [3, 4], [5]), pair([6], [7], [8, 8, 8, 8])]
    batch = collate(rows, Layout("separate", PAD, multiple=4))
    assert batch.tokens.input_ids.shape == (4, 8)
    assert batch.blocks.part.numel() == 0


@kinds
def test_the_second_response_may_be_the_better_one(kind):
    batch = collate([Comparison([1], [[2], [3]], [1], [0], [0.0])], Layout(kind, PAD))
    assert (batch.pairs.better.tolist(), batch.pairs.worse.tolist()) == ([1], [0])


@pytest.mark.parametrize(("kind", "prompt"), [("packed", 0), ("shared", 0), ("separate", 1), ("unpadded", 1)])
def test_start_is_each_pairs_own(kind, prompt):
    # the second and third share two tokens of their own
    comparison = Comparison([1], [[2, 2, 2], [3, 4, 5], [3, 4, 6]], [0, 0, 1], [1, 2, 2], [0.0] * 3)
    assert collate([comparison], Layout(kind, PAD)).pairs.start.tolist() == [prompt, prompt, prompt + 2]


@kinds
def test_a_text_that_begins_with_all_of_the_other_keeps_a_token_to_compare(kind):
    # as data.compare writes them: the shorter text's last token is its own, though the longer one has it too
    batch = collate([pair([1, 2], [3], [3, 4, 3])], Layout(kind, PAD))
    assert batch.pairs.start.tolist() == [2 if kind in WHOLE else 0]
    assert (batch.pairs.start < batch.tokens.span_lengths[[0, 1]].min()).all()


@kinds
def test_dtypes(kind):
    batch = collate(random_comparisons(0), Layout(kind, PAD), weight=0.25, row_weights=np.full(5, 0.2))
    points = ("response_weights", "targets", "weights", "row_weights")
    real = [f"pairs.{name}" for name in (*FACTS, "weights")] + [f"points.{name}" for name in points] + ["lists.weights"]
    columns = [f"tokens.{name}" for name in ("begin", "prompt_begin", "prompt_end")]
    short = columns + [f"blocks.{f.name}" for f in fields(Blocks)]
    types = dict.fromkeys(short, torch.int32) | dict.fromkeys(real, torch.float32)
    assert types.keys() < tensors(batch).keys()
    for name, tensor in tensors(batch).items():
        assert tensor.dtype == types.get(name, torch.int64), name
    assert batch.weight == 0.25


@kinds
def test_the_pairs_of_a_row_share_its_weight(kind):
    # 1/3, and 2/3 for three pairs
    comparisons = [pair([1], [2], [3]), Comparison([4], [[5], [6], [7]], [0, 0, 1], [1, 2, 2], [0.0] * 3)]
    batch = collate(comparisons, Layout(kind, PAD), row_weights=[1.0, 2.0])
    torch.testing.assert_close(batch.pairs.weights, torch.tensor([3.0, 2.0, 2.0, 2.0]) / 9)


def test_merging_by_hand():
    rows = [pair([1, 2], [3], [4], 0, 0.5), pair([1, 2], [4], [5, 6], 0), pair([1, 2], [5, 6], [3], 0, 2.0)]
    (merged,) = merge(rows, Layout("packed", PAD, 3))
    assert merged.texts == Comparison([1, 2], [[3], [4], [5, 6]], prompt_hash=0)
    assert merged.rows == [(0, [0, 1]), (1, [1, 2]), (2, [2, 0])]
    batch = collate(rows, Layout("packed", PAD, 3))
    assert (batch.pairs.better.tolist(), batch.pairs.worse.tolist()) == ([0, 1, 2], [1, 2, 0])
    assert (batch.pairs.margin[0], batch.pairs.margin[2]) == (0.5, 2.0)
    assert batch.pairs.margin[1].isnan()


@seeds
@pytest.mark.parametrize("most_responses", [2, 3, 16])
def test_merging_keeps_what_was_judged(seed, most_responses):
    rows = rows_of_prompts(seed)
    merged = merge(rows, Layout("packed", PAD, most_responses))
    for part in merged:
        texts = whole_texts(part.texts)
        assert 2 <= len(set(texts)) == len(texts) <= most_responses
        assert all(part.texts.responses)
        assert {rows[i].prompt_hash for i, _ in part.rows} == {part.texts.prompt_hash}
        for i, places in part.rows:
            assert [texts[place] for place in places] == whole_texts(rows[i])
    order = [i for part in merged for i, _ in part.rows]
    assert sorted(order) == list(range(len(rows)))
    batch = collate(rows, Layout("packed", PAD, most_responses))
    assert list(judged_in(batch)) == list(judged([rows[i] for i in order]))
    if most_responses == 16:
        assert len(merged) == len({row.prompt_hash for row in rows})


def test_rows_of_several_pairs_merge():
    first = Comparison([1], [[2], [3], [4]], [0, 1], [1, 2], [0.0, 1.0], 5)
    second = Comparison([1], [[4], [6], [2]], [0, 2], [1, 1], [2.0, 3.0], 5)
    (merged,) = merge([first, second], Layout("packed", PAD, 16))
    assert merged.texts == Comparison([1], [[2], [3], [4], [6]], prompt_hash=5)
    assert merged.rows == [(0, [0, 1, 2]), (1, [2, 3, 0])]
    batch = collate([first, second], Layout("packed", PAD, 16))
    assert (batch.pairs.better.tolist(), batch.pairs.worse.tolist()) == ([0, 1, 2, 0], [1, 2, 3, 3])
    assert batch.pairs.margin.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_beyond_the_limit_another_one_begins():
    # the first has 3 texts; the third pair would be a fourth and fifth, and what comes later joins that one
    rows = [pair([1], [k], [k + 1], 0) for k in (2, 3, 5, 6)]
    assert [(m.texts.responses, [i for i, _ in m.rows]) for m in merge(rows, Layout("packed", PAD, 3))] == [
        ([[2], [3], [4]], [0, 1]),
        ([[5], [6], [7]], [2, 3]),
    ]


def unmerged(pairs):
    return [
        MergedComparison(Comparison(c.prompt, c.responses, prompt_hash=c.prompt_hash), [(i, [0, 1])])
        for i, c in enumerate(pairs)
    ]


@pytest.mark.parametrize("hashes", [(0, 1), (None, None), (None, 0), (0, None)], ids=str)
def test_only_rows_known_to_have_one_prompt_merge(hashes):
    rows = [pair([1, 2], [3], [4], prompt_hash) for prompt_hash in hashes]
    assert merge(rows, Layout("packed", PAD, 16)) == unmerged(rows)


def test_prompts_that_were_cut_differently_stay_apart():
    # nothing is shared: 4 + 4 + 3 + 3 tokens together, 5 + 4 apart
    rows = [pair([1, 2, 3], [4], [5], 0), pair([2, 3], [4], [5], 0)]
    assert merge(rows, Layout("packed", PAD, 16)) == unmerged(rows)


def test_a_shorter_prompt_moves_tokens_to_the_responses():
    # the first pair's answers begin alike: 1 + 2 + 2 + 3 + 1 tokens together, 4 + 5 apart
    rows = [pair([1, 2], [3], [4], 0), pair([1], [2, 3], [5, 6], 0)]
    (merged,) = merge(rows, Layout("packed", PAD, 16))
    assert (merged.texts.prompt, merged.texts.responses) == ([1], [[2, 3], [2, 4], [5, 6]])
    assert list(judged_in(collate(rows, Layout("packed", PAD, 16)))) == list(judged(rows))


def test_a_merged_response_that_begins_another_keeps_a_token():
    # texts 1 2, 1 2 3 and 1 2 4; as data.compare writes them
    rows = [pair([1, 2], [3], [4], 0), pair([1], [2], [2, 3], 0)]
    (merged,) = merge(rows, Layout("packed", PAD, 16))
    assert (merged.texts.prompt, merged.texts.responses) == ([1], [[2, 3], [2, 4], [2]])
    batch = collate(rows, Layout("packed", PAD))
    assert batch.tokens.span_lengths.tolist() == [2, 2, 1]
    assert batch.pairs.start.tolist() == [1, 0]


def weights(batch):
    """Of each judged pair of texts, all of its weight."""
    total = Counter()
    for what, weight in zip(judged_in(batch), batch.pairs.weights.tolist()):
        total[what] += weight
    return total


@kinds
@seeds
@pytest.mark.parametrize("most_responses", [3, 16])
def test_a_merged_batch_holds_the_same_pairs_and_weights(kind, seed, most_responses):
    rows = rows_of_prompts(seed)
    row_weights = np.random.default_rng(seed).random(len(rows))
    layout = Layout(kind, PAD, most_responses)
    for given in (None, row_weights):
        merged = collate(rows, layout, row_weights=given)
        apart = collate([replace(row, prompt_hash=None) for row in rows], layout, row_weights=given)
        assert len(merged.tokens.ends) < len(apart.tokens.ends)
        assert weights(merged) == pytest.approx(weights(apart))
        assert merged.pairs.weights.sum().item() == pytest.approx(1)
        assert sorted(judged_in(merged)) == sorted(judged_in(apart)) == sorted(judged(rows))


def random_mixture(seed, count=14):
    """Pairs, lists of 3 to 5 and single answers, of a few texts of three prompts; what is not said is NaN or absent."""
    rng = np.random.default_rng(seed)
    prompts, responses = [[p, 7, *ids(rng, 0, 4)] for p in range(3)], [[k, *ids(rng, 0, 5)] for k in range(6)]
    found = []
    for size in [1, 2, 3, 5, *rng.choice([1, 2, 3, 4, 5], count - 4)]:
        which, ranks = int(rng.integers(3)), (rng.integers(0, 3, size) if size > 2 else np.arange(size)).tolist()
        pairs = [(a, b) for a, b in itertools.permutations(range(size), 2) if ranks[a] < ranks[b]]

        def some(length):
            return np.where(rng.random(length) < 0.3, np.nan, rng.normal(size=length)).tolist()

        c = Comparison(prompts[which], [responses[k] for k in rng.permutation(6)[:size]], prompt_hash=which - 1)
        facts = {name: some(len(pairs)) if rng.random() < 0.7 else [] for name in FACTS}
        better, worse = [a for a, _ in pairs], [b for _, b in pairs]
        targets = some(size) if rng.random() < 0.7 or size == 1 else []
        asked = [None, len(c.prompt), len(c.prompt) - 1][which]
        more = {"ranks": ranks if size > 1 else [], "targets": targets, "prompt_tokens": asked}
        found.append(replace(c, better=better, worse=worse, **facts, **more))
    return found


def words(*values):
    return tuple(f"{float(np.float32(value)):.5f}" for value in values)  # as a batch has them


def slow_judged(comparisons, row_weights, kind):
    """What was judged, one Comparison after the other: pairs, lists, rows with their answers."""
    given = [max(len(c.better), 1) for c in comparisons] if row_weights is None else row_weights
    pairs, lists, rows = [], [], []
    for c, weight in zip(comparisons, given):
        share, texts = weight / sum(given), whole_texts(c)
        for i, (a, b) in enumerate(zip(c.better, c.worse)):
            facts = [getattr(c, name)[i] if getattr(c, name) else math.nan for name in FACTS]
            start = first_difference(texts[a], texts[b]) - (0 if kind in WHOLE else len(c.prompt))
            pairs.append((texts[a], texts[b], start, *words(*facts, share / len(c.better))))
        if c.ranks:
            lists.append(([*zip(texts, c.ranks)], *words(share)))
        scored = sum(not math.isnan(target) for target in c.targets)
        asked = len(c.prompt) if c.prompt_tokens is None else c.prompt_tokens
        answers = []
        for text, target in zip(texts, c.targets or [math.nan] * len(texts)):
            point = (0, 0) if math.isnan(target) else (target, share / scored)
            answers.append((text, len(text) - asked, *words(share / len(texts), *point)))
        rows.append((answers, *words(share)))
    return pairs, lists, rows


def fast_judged(batch):
    texts = texts_in(batch)
    facts = zip(*(getattr(batch.pairs, name).tolist() for name in (*FACTS, "weights")))
    sides = zip(batch.pairs.better.tolist(), batch.pairs.worse.tolist(), batch.pairs.start.tolist())
    pairs = [(texts[a], texts[b], start, *words(*fact)) for (a, b, start), fact in zip(sides, facts)]
    lists = []
    for at, ranks, weight in zip(batch.lists.responses.tolist(), batch.lists.ranks.tolist(), batch.lists.weights):
        size = sum(rank >= 0 for rank in ranks)
        assert ranks[size:] == [-1] * (len(ranks) - size)
        assert all(0 <= i < len(texts) for i in at)  # what stands where there is none can be looked up
        lists.append(([*zip([texts[i] for i in at[:size]], ranks)], *words(weight)))
    rows = [([], *words(weight)) for weight in batch.points.row_weights]
    numbers = zip(batch.points.responses.tolist(), batch.points.rows.tolist())
    facts = zip(*(getattr(batch.points, name).tolist() for name in ("response_weights", "targets", "weights")))
    for (at, row), fact in zip(numbers, facts):
        rows[row][0].append((texts[at], batch.tokens.response_lengths[at].item(), *words(*fact)))
    return pairs, lists, rows


def in_any_order(found):
    return [sorted(part) for part in found]


@kinds
@seeds
@pytest.mark.parametrize("weighted", [False, True])
def test_what_was_judged_agrees_with_a_slow_reference(kind, seed, weighted):
    rows = random_mixture(seed)
    row_weights = np.random.default_rng(seed).random(len(rows)) if weighted else None
    groups = [row.prompt_hash for row in rows]
    merged = collate(rows, Layout(kind, PAD), groups=groups, row_weights=row_weights)
    apart = collate([replace(row, prompt_hash=None) for row in rows], Layout(kind, PAD), row_weights=row_weights)
    slow = slow_judged(rows, row_weights, kind)
    assert fast_judged(apart) == slow
    assert in_any_order(fast_judged(merged)) == in_any_order(slow)  # it lists the rows of a prompt together
    for batch in (merged, apart):
        assert batch.lists.responses.shape == batch.lists.ranks.shape == (len(slow[1]), 5)
        assert batch.points.rows.tolist() == sorted(batch.points.rows.tolist())
        assert batch.points.row_weights.sum().item() == pytest.approx(1)
        assert batch.points.response_weights.sum().item() == pytest.approx(1)
    texts = texts_in(merged)
    assert len(texts) == len(set(texts)) < len(texts_in(apart)) == len(merged.points.responses)


@kinds
def test_weights_by_hand(kind):
    pairs = {"better": [0, 0, 1], "worse": [1, 2, 2], "margin": [0.0] * 3}
    ranked = Comparison([4], [[5], [6], [7]], **pairs, ranks=[0, 1, 2], targets=[0.5, math.nan, -2.0])
    rows = [pair([1], [2], [3]), ranked, answer([8], [8], 3.0)]
    batch = collate(rows, Layout(kind, PAD), row_weights=[1, 2, 1])
    assert batch.points.row_weights.tolist() == [1 / 4, 1 / 2, 1 / 4]
    assert batch.pairs.weights.tolist() == pytest.approx([1 / 4, 1 / 6, 1 / 6, 1 / 6])
    assert batch.lists.weights.tolist() == [1 / 2]
    assert batch.points.rows.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.points.response_weights.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 6, 1 / 6, 1 / 6, 1 / 4])
    assert batch.points.targets.tolist() == [0, 0, 0.5, 0, -2, 3]
    assert batch.points.weights.tolist() == [0, 0, 1 / 4, 0, 1 / 4, 1 / 4]
    # none given: 1 for each pair, and for a row without one
    assert collate(rows, Layout(kind, PAD)).points.row_weights.tolist() == pytest.approx([1 / 5, 3 / 5, 1 / 5])


def test_lists_are_padded_to_the_longest():
    two, three = (Comparison([1], [[2], [3], [4]][:k], ranks=[1, 0, 1][:k]) for k in (2, 3))
    batch = collate([two, three], Layout("packed", PAD))
    assert batch.lists.ranks.tolist() == [[1, 0, -1], [1, 0, 1]]
    assert (batch.lists.responses[0, :2].tolist(), batch.lists.responses[1].tolist()) == ([0, 1], [2, 3, 4])


@kinds
def test_a_batch_may_lack_pairs_lists_or_scores(kind):
    points = collate([answer([1], [2], 0.5), answer([1, 3], [4], 1.0)], Layout(kind, PAD))
    for name, tensor in tensors(points).items():
        if name.startswith("pairs.") or name == "lists.weights":
            assert tensor.shape == (0,), name
    assert points.lists.responses.shape == points.lists.ranks.shape == (0, 0)
    assert points.points.weights.tolist() == points.points.row_weights.tolist() == [0.5, 0.5]
    pairs = collate([pair([1], [2], [3])], Layout(kind, PAD))
    assert pairs.lists.responses.shape == (0, 0)
    assert (pairs.points.targets.tolist(), pairs.points.weights.tolist()) == ([0, 0], [0, 0])
    assert (pairs.points.responses.tolist(), pairs.points.response_weights.tolist()) == ([0, 1], [0.5, 0.5])


@kinds
@pytest.mark.parametrize(("asked", "lengths"), [(None, [1, 2]), (3, [1, 2]), (1, [3, 4]), (0, [4, 5])])
def test_lengths_are_of_what_follows_what_was_asked(kind, asked, lengths):
    row = replace(pair([1, 2, 3], [4], [5, 6]), prompt_tokens=asked)
    assert collate([row], Layout(kind, PAD)).tokens.response_lengths.tolist() == lengths


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_single_answers_of_a_prompt_share_it(kind):
    rows = [answer([1, 2, 3], [k, k + 1], k / 2, prompt_hash=0) for k in (4, 6, 8)]
    batch = collate(rows, Layout(kind, PAD), groups=[0, 0, 0])
    assert batch.tokens.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.tokens.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 3, 4]]
    assert batch.tokens.ends.tolist() == [4, 6, 8]
    assert batch.points.rows.tolist() == [0, 1, 2]
    assert batch.points.targets.tolist() == [2, 3, 4]


@kinds
def test_an_answer_that_was_scored_twice_is_there_once(kind):
    rows = [answer([1], [2], 0.25, 0), pair([1], [3], [2], 0), answer([1], [2], 0.75, 0)]
    batch = collate(rows, Layout(kind, PAD), groups=[0] * 3)
    assert texts_in(batch) == [(1, 2), (1, 3)]
    assert (batch.points.responses.tolist(), batch.points.rows.tolist()) == ([0, 1, 0, 0], [0, 1, 1, 2])
    assert batch.points.targets.tolist() == [0.25, 0, 0, 0.75]
    assert (batch.pairs.better.tolist(), batch.pairs.worse.tolist()) == ([1], [0])


def assert_same(one, other):
    assert one.weight == other.weight
    torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=0, equal_nan=True)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate(random_comparisons(0), Layout("shared", PAD), weight=0.25)
    moved = batch.to(torch.device("meta"))
    assert moved.weight == 0.25
    for name, tensor in tensors(moved).items():
        assert tensor.device.type == "meta"
        assert tensor.shape == tensors(batch)[name].shape
    assert_same(batch.to(torch.device("cpu")), batch)


@kinds
@pytest.mark.parametrize("seed", range(5))
def test_a_packed_batch_is_the_same_batch_in_one_tensor(kind, seed):
    batch = collate(random_mixture(seed, 12), Layout(kind, PAD), weight=0.25)
    packed = batch.packed()
    assert packed.buffer.dtype == torch.int64
    again = packed.to(torch.device("cpu"))
    assert again.weight == 0.25
    assert_same(again, batch)
    for name, tensor in tensors(again).items():
        assert tensor.dtype == tensors(batch)[name].dtype
        assert tensor.data_ptr() % 16 == packed.buffer.data_ptr() % 16 or not tensor.numel()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_the_loader_of_a_gpu_opens_few_files():
    """At ulimit -n 1024, 27 tensors a batch end a run whose accumulation is 16."""
    rows = rows_of_prompts(0)
    plan = [[MicroBatch(np.array([i % 8]), 1 / 32) for i in range(32)] for _ in range(6)]
    before, most = len(os.listdir("/proc/self/fd")), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no GPU to pin memory for
        for step in loader(PlannedBatches(rows, plan, Layout("packed", PAD)), on_gpu=True):
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            assert [batch.to(torch.device("cpu")).weight for batch in step] == [1 / 32] * 32
    assert most < 32 * 8


@kinds
@pytest.mark.parametrize("make", [rows_of_prompts, lambda seed: random_mixture(seed, 12)], ids=["pairs", "mixture"])
def test_the_loader_gives_the_batches_of_the_plan_in_order(kind, make):
    rows = [replace(row, similarity=[]) for row in make(0)]  # the file has none
    plan = EpochPlan(single_rows(table(rows), by_row=True), BatchSpec(2, 2, layout=kind), 1, 2, 0, 0)
    layout = Layout(kind, PAD)
    batches = list(loader(PlannedBatches(table(rows), plan, layout), on_gpu=False))
    assert [len(step) for step in batches] == [2, 2]  # of 8 rows and 4: half of them this rank's
    for step, micro_batches in zip(batches, plan):
        for batch, m in zip(step, micro_batches):
            chosen, ones = [rows[row] for row in m.rows], [1] * len(m.rows)
            assert_same(batch, collate(chosen, layout, m.weight, row_weights=ones))
            assert in_any_order(fast_judged(batch)) == in_any_order(slow_judged(chosen, ones, kind))


def test_padded_rows_merge_across_units_only_below_the_longest():
    """Two rows of one prompt would make a row of 6 where the longest has 5; as one group they do."""
    rows = [pair([1, 2], [3], [4], 7), pair([1, 2], [5], [6], 7), pair([9], [8, 8], [7, 7], 8)]
    assert [len(m.texts.responses) for m in merge(rows, Layout("shared", PAD))] == [2, 2, 2]
    assert [len(m.texts.responses) for m in merge(rows, Layout("packed", PAD))] == [4, 2]
    assert [len(m.texts.responses) for m in merge(rows, Layout("shared", PAD), groups=[0, 0, 1])] == [4, 2]
    longer = [*rows[:2], pair([9], [8, 8, 8], [7, 7, 7], 8)]
    assert [len(m.texts.responses) for m in merge(longer, Layout("shared", PAD))] == [4, 2]


def test_a_unit_stays_whole_beside_another_of_its_prompt():
    """Two stars with three rays, limit 6: joined ray by ray, the second centre would be encoded twice."""
    stars = [pair([1], [center], [center + ray], 7) for center in (10, 20) for ray in (1, 2, 3)]
    merged = merge(stars, Layout("packed", PAD, most_responses=6), groups=[0] * 3 + [1] * 3)
    assert [len(m.texts.responses) for m in merged] == [4, 4]


def test_loading_hands_on_weights():
    rows = [pair([1], [2], [3]), pair([4], [5], [6])]
    plan = [[MicroBatch(np.array([1, 0]), 0.25, row_weights=np.array([0.75, 0.25]))], [MicroBatch(np.array([0]), 0.0)]]
    loading = PlannedBatches(rows, plan, Layout("separate", PAD))
    assert len(loading) == 2
    ((first,), (filler,)) = loading
    assert first.tokens.input_ids.tolist() == [[4, 5], [4, 6], [1, 2], [1, 3]]
    assert (first.weight, first.pairs.weights.tolist()) == (0.25, [0.75, 0.25])
    assert (filler.weight, filler.pairs.weights.tolist()) == (0.0, [1.0])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_loading_draws_no_random_numbers(on_gpu):
    rows = rows_of_prompts(0)
    plan = EpochPlan(single_rows(table(rows)), BatchSpec(2), 0, 1, 0, 0)
    state = torch.get_rng_state()
    batches = list(loader(PlannedBatches(rows, plan, Layout("packed", PAD)), on_gpu))
    assert len(batches) == 6
    assert torch.equal(torch.get_rng_state(), state)


@seeds
def test_blocks_are_those_that_create_block_mask_finds(seed):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    rng = np.random.default_rng(seed)
    rows = [pair([1] * rng.integers(0, 500), [2] * rng.integers(1, 90), [3] * rng.integers(1, 300)) for _ in range(9)]
    batch = collate(rows, Layout("packed", PAD, block=128))
    width = batch.tokens.input_ids.shape[1]
    made = block_mask(batch)
    theirs = flex.create_block_mask(visibility(batch.tokens), 1, None, width, width, device="cpu")
    assert made.shape == theirs.shape
    assert batch.blocks.whole_number.sum() > 0
    for kind in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        numbers, indices = (getattr(mask, kind) for mask in (made, theirs)), kind.replace("num_blocks", "indices")
        ours, own = (each[0, 0].tolist() for each in numbers)
        assert ours == own, kind
        for block, count in enumerate(ours):
            found, expected = (sorted(getattr(m, indices)[0, 0, block, :count].tolist()) for m in (made, theirs))
            assert found == expected


MANY = """
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from reward_model.batching.collate import PlannedBatches, loader
from reward_model.batching.layout import Layout
from reward_model.batching.plan import MicroBatch
from reward_model.data.comparisons import Comparison
rows = [Comparison([1, 2], [[3, 4], [5]], [0], [1], [0.5])] * 32
plan = [[MicroBatch(np.array([row]), 1 / 32) for row in range(32)]] * 6
tokens = 0
for step in loader(PlannedBatches(rows, plan, Layout("packed", 0)), on_gpu=True):
    tokens += sum(packed.to("cpu").tokens.input_ids.numel() for packed in step)
print(tokens)
"""


@pytest.mark.slow
def test_a_step_of_many_micro_batches_needs_few_open_files():
    """One file a micro-batch between processes: 32 of them, two steps ahead in two workers, at a limit of 300."""
    done = subprocess.run([sys.executable, "-c", MANY], cwd=runs.TOP, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{5 * 32 * 6}\n", done.stderr[-2000:]
