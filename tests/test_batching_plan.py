# SPDX-License-Identifier: Apache-2.0
"""Groups, and the plans of an epoch and of an evaluation, against slow counts."""

import itertools
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
from comparisons import answer, pair, table

from reward_model.batching.collate import PlannedBatches
from reward_model.batching.groups import RowGroups, rows_by_prompt, rows_to_evaluate, single_rows
from reward_model.batching.layout import Layout
from reward_model.batching.merging import merge
from reward_model.batching.plan import BatchSpec, EpochPlan, plan_evaluation
from reward_model.data.comparisons import Comparison, Comparisons
from reward_model.data.preprocessing import FEATURES

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ("packed", "shared", "separate", "unpadded")
# groups, micro_batch, accumulation, world_size: whole batches, a short last one, fewer groups than ranks, one group
SPLITS = [(24, 2, 3, 2), (23, 2, 3, 2), (25, 2, 3, 2), (7, 4, 1, 1), (3, 2, 2, 8), (1, 1, 1, 4), (100, 3, 4, 5)]


def random_groups(size, most_rows=1, seed=0, by_row=False):
    """Groups of 1 to so many rows each; with more than one, a row has 1 or 2 pairs."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, most_rows + 1, size)
    starts = np.concatenate([[0], np.cumsum(rows)])
    sizes = np.ones(starts[-1], np.int64) if by_row else pairs_of_rows(starts[-1], most_rows)
    total = np.add.reduceat(sizes, starts[:-1]) if size else np.zeros(0, np.int64)
    length = rng.integers(5, 50, size)
    tokens = length + rows * rng.integers(1, 20, size)
    return RowGroups(np.arange(starts[-1]), sizes, starts, total, rows + 1, length, tokens, length * (rows + 1) - rows)


def pairs_of_rows(rows, most_rows):
    return 1 + np.arange(rows) % 2 * (most_rows > 1)


def groups_of(tokens, texts=2):
    """One row and one pair in each; its longest text has as many tokens as the group."""
    tokens, ones = np.array(tokens), np.ones(len(tokens), np.int64)
    apart = texts * tokens
    return RowGroups(
        np.arange(len(tokens)), ones, np.arange(len(tokens) + 1), ones, texts * ones, tokens, tokens, apart
    )


def steps_of(groups, spec, world_size, seed=1, epoch=0):
    """For each step, a list of each rank's micro-batches."""
    plans = [EpochPlan(groups, spec, rank, world_size, seed, epoch) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    return list(zip(*plans))


def counted(step):
    """Rows of a step, fillers left out."""
    return sorted(int(row) for micro_batches in step for m in micro_batches if m.weight for row in m.rows)


def groups_in(micro_batch, groups):
    """Which groups a micro-batch holds; all of each."""
    rows = micro_batch.rows.tolist()
    found = [u for u in range(len(groups)) if int(groups.rows[groups.starts[u]]) in rows]
    assert sorted(rows) == sorted(row for u in found for row in groups.rows_of(u))
    return found


def cost(found, groups, layout):
    """Tokens and pads of groups in a micro-batch."""
    if layout == "packed":
        return sum(groups.tokens[u] for u in found)
    if layout == "unpadded":
        return sum(groups.apart[u] for u in found)
    if layout == "shared":
        return len(found) * max(groups.tokens[u] for u in found)
    return sum(groups.texts[u] for u in found) * max(groups.length[u] for u in found)


splits = pytest.mark.parametrize("split", SPLITS, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
unit_rows = pytest.mark.parametrize("most_rows", [1, 6])


def rules(micro_batch, accumulation, **more):
    for layout, tokens in itertools.product(LAYOUTS, [0, 40, 200]):
        yield BatchSpec(micro_batch, accumulation, layout=layout, tokens=tokens, **more)


@splits
@unit_rows
@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
def test_every_row_comes_once_an_epoch(split, most_rows, by_prompt, by_length):
    size, micro_batch, accumulation, world_size = split
    groups = random_groups(size, most_rows)
    for spec in rules(micro_batch, accumulation, by_prompt=by_prompt, by_length=by_length):
        steps = steps_of(groups, spec, world_size)
        assert sorted(row for step in steps for row in counted(step)) == list(range(len(groups.rows)))


@splits
@unit_rows
def test_every_rank_takes_part_in_every_micro_batch(split, most_rows):
    size, micro_batch, accumulation, world_size = split
    for spec in rules(micro_batch, accumulation):
        steps = steps_of(random_groups(size, most_rows), spec, world_size)
        if most_rows == 1:
            assert len(steps) == math.ceil(size / (micro_batch * accumulation * world_size))
        for step in steps:
            (number,) = {len(micro_batches) for micro_batches in step}
            assert number == accumulation or spec.tokens
            every = [m for micro_batches in step for m in micro_batches]
            assert all(len(m.rows) == 1 if m.weight == 0 else len(m.rows) >= 1 for m in every)
            if most_rows == 1 and not spec.tokens:
                assert all(len(m.rows) <= micro_batch for m in every)


def gradient(micro_batch, gradients):
    """Of its weighted mean loss. gradients: of each row's pairs, (p, 3)."""
    if not micro_batch.weight:
        return 0.0
    means = [gradients[row].mean(axis=0) for row in micro_batch.rows]  # a row's pairs share its weight
    return micro_batch.weight * np.average(means, axis=0, weights=micro_batch.row_weights)


@splits
@unit_rows
@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_weights_make_the_mean_over_the_global_batch(split, most_rows, by_prompt, by_row):
    """Of its pairs, of its rows, or of its prompts, which are means of the one or of the other."""
    size, micro_batch, accumulation, world_size = split
    groups = random_groups(size, most_rows, by_row=by_row)
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(pairs, 3)) for pairs in pairs_of_rows(len(groups.rows), most_rows)]
    for spec in rules(micro_batch, accumulation, by_prompt=by_prompt):
        for step in steps_of(groups, spec, world_size):
            every = [*itertools.chain(*step)]
            rows = set(counted(step))
            together = (
                [groups.rows_of(u) for u in range(size) if groups.rows_of(u)[0] in rows] if by_prompt else [[*rows]]
            )
            parts = [
                [gradients[row].mean(axis=0, keepdims=by_row) if by_row else gradients[row] for row in group]
                for group in together
            ]
            means = [np.concatenate(part).mean(axis=0) for part in parts]
            assert sum(m.weight for m in every) == pytest.approx(1)
            np.testing.assert_allclose(sum(gradient(m, gradients) for m in every), np.mean(means, axis=0), atol=1e-12)


def test_weights_by_hand():
    # 3 pairs for 2 ranks of 2: one gets two of them, the other the third
    ((first,), (second,)) = steps_of(groups_of([3, 2, 1]), BatchSpec(2), 2)[0]
    assert sorted([(len(m.rows), m.weight) for m in (first, second)]) == [
        (1, pytest.approx(1 / 3)),
        (2, pytest.approx(2 / 3)),
    ]
    # two prompts of 1 and 3 pairs
    more = np.array([2, 3]), *np.array([[5, 5], [8, 9], [9, 12]])
    groups = RowGroups(np.arange(4), np.ones(4, np.int64), np.array([0, 1, 4]), np.array([1, 3]), *more)
    (((m,),),) = steps_of(groups, BatchSpec(2, by_prompt=True), 1)
    weights = dict(zip(m.rows.tolist(), (m.row_weights / m.row_weights.sum()).tolist()))
    assert weights == pytest.approx({0: 1 / 2, 1: 1 / 6, 2: 1 / 6, 3: 1 / 6})
    assert m.weight == 1
    # pairs of 1, 3: shares of 4 on two ranks
    assert sorted(m.weight for (m,) in steps_of(groups, BatchSpec(2), 2)[0]) == [1 / 4, 3 / 4]
    # one prompt with rows of 1 and 3 pairs beside one with a row of 4: pairs weigh 1/8 each, in a prompt as in none
    groups = RowGroups(np.arange(3), np.array([1, 3, 4]), np.array([0, 2, 3]), np.array([4, 4]), *more)
    for by_prompt in (False, True):
        (((m,),),) = steps_of(groups, BatchSpec(8, by_prompt=by_prompt), 1)
        weights = dict(zip(m.rows.tolist(), (m.row_weights / m.row_weights.sum()).tolist()))
        assert weights == pytest.approx({0: 1 / 8, 1: 3 / 8, 2: 1 / 2})


@unit_rows
@pytest.mark.parametrize("by_length", [False, True])
def test_a_step_holds_the_same_however_it_is_split(most_rows, by_length):
    groups = random_groups(50, most_rows)
    contents = []
    for (micro_batch, accumulation, world_size), layout, tokens in itertools.product(
        [(8, 1, 1), (4, 2, 1), (2, 1, 4), (1, 2, 4)], LAYOUTS, [0, 100]
    ):
        spec = BatchSpec(micro_batch, accumulation, layout=layout, tokens=tokens, by_length=by_length)
        contents.append([counted(step) for step in steps_of(groups, spec, world_size)])
    assert len(contents[0]) > 5
    assert all(content == contents[0] for content in contents)


def test_a_unit_of_many_pairs_goes_where_most_of_it_lies():
    groups = random_groups(200, most_rows=6)
    pairs = pairs_of_rows(len(groups.rows), 6)
    numbers = [pairs[counted(step)].sum() for step in steps_of(groups, BatchSpec(20), 1)]
    borders = 20 * np.arange(1, len(numbers))
    assert len(numbers) > 20
    assert (np.abs(np.cumsum(numbers)[:-1] - borders) <= (groups.size.max() + 1) / 2).all()


@pytest.mark.parametrize("by_length", [False, True])
def test_the_order_depends_on_seed_and_epoch_alone(by_length):
    groups = random_groups(64)

    def order(**which):
        steps = steps_of(groups, BatchSpec(4, by_length=by_length), 2, **which)
        return tuple(tuple(counted(step)) for step in steps)

    assert order(seed=5, epoch=3) == order(seed=5, epoch=3)
    distinct = {order(seed=seed, epoch=epoch) for seed in (5, 6) for epoch in (0, 1, 2)}
    assert len(distinct) == 6
    assert not any(step[-1] - step[0] == len(step) - 1 for content in distinct for step in content)  # as in the file


@layouts
@unit_rows
@pytest.mark.parametrize("tokens", [40, 150, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_no_micro_batch_exceeds_the_token_limit(layout, most_rows, tokens, world_size):
    groups = random_groups(100, most_rows)
    steps = steps_of(groups, BatchSpec(8, 2, layout=layout, tokens=tokens), world_size)
    every = [groups_in(m, groups) for step in steps for m in itertools.chain(*step) if m.weight]
    assert all(cost(found, groups, layout) <= tokens for found in every if len(found) > 1)
    assert any(len(found) > 1 for found in every) or tokens == 40


@layouts
def test_a_wide_token_limit_is_one_micro_batch_of_each_rank(layout):
    for step in steps_of(random_groups(100), BatchSpec(8, 2, layout=layout, tokens=10**6), 3):
        assert [len(micro_batches) for micro_batches in step] == [1] * 3


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("packed", [[10, 6], [5, 5, 1]]),
        ("shared", [[10], [6, 5], [5, 1]]),  # 6 + 5 + 5: 18 with pads
        ("unpadded", [[10], [6], [5], [5, 1]]),
        ("separate", [[10], [6], [5], [5], [1]]),  # two texts each: 5 and 1 would be 20
    ],
)
def test_a_token_limit_by_hand(layout, expected):
    tokens = np.array([5, 10, 1, 6, 5])
    plan = plan_evaluation(groups_of(tokens), BatchSpec(99, layout=layout, tokens=16), 0, 1)
    assert [tokens[m.rows].tolist() for m in plan] == expected


def test_a_packed_step_takes_no_more_micro_batches_than_its_limit_needs():
    # 9 + 6 + 5 and 8 + 7 + 4; then 9 + 4, 8 + 5 and 7 + 6
    groups = groups_of([4, 9, 5, 8, 6, 7])
    for limit, expected in ((39, 1), (20, 2), (19, 3)):
        ((micro_batches,),) = steps_of(groups, BatchSpec(6, tokens=limit), 1)
        assert len(micro_batches) == expected


@unit_rows
@pytest.mark.parametrize(("tokens", "world_size"), [(0, 1), (0, 4), (150, 4)])
@pytest.mark.parametrize("size", [64, 61, 5])
def test_packed_ranks_have_about_as_much_to_compute(most_rows, tokens, world_size, size):
    groups = random_groups(size, most_rows)
    spec = BatchSpec(100 // world_size, 3, tokens=tokens)
    for step in steps_of(groups, spec, world_size):
        found = [groups_in(m, groups) if m.weight else [] for together in zip(*step) for m in together]
        loads = [sum(groups.tokens[u] for u in part) for part in found]
        # a round gives the least loaded the longest: a difference never grows past the longest of the round
        assert max(loads) - min(loads) <= max(groups.tokens[u] for part in found for u in part)
        if not tokens:
            assert max(map(len, found)) - min(map(len, found)) <= 1
        assert loads == sorted(loads, reverse=True)  # what runs at the same time: neighbors


def test_balance_by_hand():
    # 9 | 8, then 7 to the 8 and 6 to the 9, then 15 each: 5 | 4
    tokens = np.array([4, 9, 5, 8, 6, 7])
    (step,) = steps_of(groups_of(tokens), BatchSpec(3), 2)
    assert sorted(sorted(tokens[m.rows].tolist()) for (m,) in step) == [[4, 7, 8], [5, 6, 9]]


def test_padded_rows_are_about_as_long_as_their_neighbors():
    tokens = np.array([4, 9, 5, 8, 6, 7])
    for layout in ("shared", "separate"):
        (step,) = steps_of(groups_of(tokens), BatchSpec(1, 3, layout=layout), 2)
        assert [[tokens[m.rows].tolist() for m in rank] for rank in step] == [[[9], [7], [5]], [[8], [6], [4]]]


def test_steps_by_length_hold_similar_lengths_in_random_order():
    groups = groups_of(np.random.default_rng(0).integers(1, 1000, 1003))

    def lengths(by_length, epoch=0):
        return [
            groups.length[counted(step)] for step in steps_of(groups, BatchSpec(8, by_length=by_length), 1, epoch=epoch)
        ]

    def spread(steps):
        return np.mean([step.max() - step.min() for step in steps[:-1]])

    steps, random = lengths(True), lengths(False)
    assert [len(step) for step in steps] == [8] * 125 + [3]
    assert sorted(np.concatenate(steps)) == sorted(groups.length)
    assert spread(steps) < 0.1 * spread(random)  # 1000 · 8 / 400 and 1000 · 7 / 9
    means = [step.mean() for step in steps]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3
    assert [step.tolist() for step in steps] != [step.tolist() for step in lengths(True, epoch=1)]
    contents = [{tuple(step) for step in lengths(True, epoch)} for epoch in (0, 1)]
    assert contents[0] != contents[1]  # nor are they the same steps in another order


@pytest.mark.parametrize("by_length", [False, True])
def test_no_units_are_no_steps(by_length):
    for spec in rules(2, 1, by_length=by_length):
        assert steps_of(random_groups(0), spec, 2) == []


def test_a_step_can_be_asked_for_alone():
    groups = random_groups(100_000)
    plan = EpochPlan(groups, BatchSpec(4, 2), 1, 4, 0, 0)
    assert len(plan) == 3125  # of 32
    assert [len(m.rows) for m in plan[2500]] == [4, 4]
    again = EpochPlan(groups, BatchSpec(4, 2), 1, 4, 0, 0)
    assert [m.rows.tolist() for m in again[2500]] == [m.rows.tolist() for m in plan[2500]]
    assert [m.rows.tolist() for m in plan[2501]] != [m.rows.tolist() for m in plan[2500]]


def graph(edges, prompt_hash=0, prompt=(1, 2)):
    """Rows of a prompt; text i is i + 3 tokens long and begins with a token of its own."""
    return [pair([*prompt], [10 + a] * (a + 1), [10 + b] * (b + 1), prompt_hash) for a, b in edges]


def random_rows(seed, prompts=6, texts=7, rows=60):
    """Pairs of a few texts of a few prompts, some of them judged twice and either way round."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        prompt = int(rng.integers(prompts))
        found += graph([rng.choice(texts, 2, replace=False).tolist()], prompt - 3, [prompt] * prompt)
    return found


def sizes(groups):
    return sorted(np.diff(groups.starts).tolist(), reverse=True)


def test_single_rows_are_groups():
    rows = [*random_rows(0, rows=5), Comparison([1], [[2], [3, 4], [5]], [0, 1], [1, 2], [0.0, 0.0], 0)]
    groups = single_rows(table(rows))
    assert [groups.rows_of(u).tolist() for u in range(len(groups))] == [[i] for i in range(6)]
    assert groups.size.tolist() == groups.sizes.tolist() == [1] * 5 + [2]
    assert single_rows(table(rows), by_row=True).size.tolist() == [1] * 6
    assert groups.texts.tolist() == [2] * 5 + [3]
    assert groups.length.tolist() == [len(c.prompt) + max(map(len, c.responses)) for c in rows]
    assert groups.tokens.tolist() == [c.tokens for c in rows]
    assert groups.apart.tolist() == [sum(len(c.prompt) + len(r) for r in c.responses) for c in rows]


@pytest.mark.parametrize("limits", [(2, 1), (2, 100), (3, 2), (4, 6), (16, 3), (16, 100)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_rows_come_together_by_prompt(limits, seed):
    most_responses, most_pairs = limits
    rows = random_rows(seed)
    groups = rows_by_prompt(table(rows), *limits, seed)
    assert sorted(groups.rows) == list(range(len(rows)))
    assert len(groups.starts) == len(groups) + 1
    for u in range(len(groups)):
        group = [rows[row] for row in groups.rows_of(u)]
        texts = {(*c.prompt, *response) for c in group for response in c.responses}
        assert len({c.prompt_hash for c in group}) == 1
        assert 1 <= len(group) == groups.size[u] == groups.sizes_of(u).sum() <= most_pairs
        assert len(texts) == groups.texts[u] <= most_responses
        assert groups.length[u] == max(map(len, texts))
        assert groups.tokens[u] == sum(map(len, texts)) - (len(texts) - 1) * len(group[0].prompt)
        (merged,) = merge(group, Layout("packed", 0, most_responses))
        assert groups.tokens[u] == merged.texts.tokens


def test_wide_limits_leave_one_unit_a_prompt():
    rows = random_rows(0)
    groups = rows_by_prompt(table(rows), 16, 100, 0)
    assert len(groups) == len({c.prompt_hash for c in rows}) == 6


COMPLETE = [*itertools.combinations(range(4), 2)]
STAR = [(0, leaf) for leaf in range(1, 6)]
CHAIN = [(i, i + 1) for i in range(4)]
DISJOINT = [(0, 1), (2, 3), (4, 5)]
TWICE = [(0, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("edges", "most_responses", "most_pairs", "expected"),
    [
        (COMPLETE, 4, 6, [6]),
        (COMPLETE, 3, 6, [3, 2, 1]),  # a triangle, and of the fourth text's three rows two
        (COMPLETE, 2, 6, [1] * 6),
        (STAR, 4, 6, [3, 2]),  # the center and three others
        (CHAIN, 5, 6, [4]),
        (CHAIN, 16, 2, [2, 2]),
        (DISJOINT, 6, 6, [3]),
        (DISJOINT, 5, 6, [2, 1]),
        (DISJOINT, 2, 6, [1] * 3),
        (TWICE, 2, 6, [3]),
        (TWICE, 2, 2, [2, 1]),
        ([(0, 1)], 2, 1, [1]),
    ],
)
def test_blocks_by_hand(edges, most_responses, most_pairs, expected):
    comparisons = table(graph(edges))
    assert all(sizes(rows_by_prompt(comparisons, most_responses, most_pairs, seed)) == expected for seed in range(4))


def test_a_complete_graph_is_encoded_once():
    # prompt 2 tokens, responses 1, 2, 3 and 4
    groups = rows_by_prompt(table(graph(COMPLETE)), 4, 6, 0)
    assert (groups.size.tolist(), groups.texts.tolist()) == ([6], [4])
    assert (groups.length.tolist(), groups.tokens.tolist()) == ([6], [12])


def test_more_than_two_responses_stay_apart_from_pairs():
    three = Comparison([1, 2], [[10], [11, 11], [12]], [0, 1], [1, 2], [0.0, 0.0], 0)
    groups = rows_by_prompt(table([*graph(COMPLETE[:2]), three]), 16, 100, 0)
    found = {tuple(sorted(groups.rows_of(u).tolist())): u for u in range(2)}
    assert set(found) == {(0, 1), (2,)}
    alone = found[2,]
    assert (groups.size[alone], groups.texts[alone], groups.length[alone], groups.tokens[alone]) == (2, 3, 4, 6)


def test_equal_texts_of_two_prompts_stay_apart():
    assert sizes(rows_by_prompt(table([*graph(TWICE, 0), *graph(TWICE, 1)]), 16, 100, 0)) == [3, 3]


def test_a_prompt_cut_in_two_places_is_counted_apart():
    # together 3 + 3 + 9 + 9 tokens, less what they share: nothing
    rows = [pair([1, 2], [3], [4], 0), pair([2] * 8, [3], [4], 0)]
    groups = rows_by_prompt(table(rows), 16, 100, 0)
    assert sum(m.texts.tokens for m in merge(rows, Layout("packed", 0, 16))) == 14
    assert groups.tokens.tolist() == [14]


def test_only_chosen_rows_come():
    comparisons = table(random_rows(0))
    chosen = np.array([40, 3, 17, 59, 4])
    assert sorted(rows_by_prompt(comparisons, 16, 100, 0, chosen).rows) == sorted(chosen)
    assert len(rows_by_prompt(comparisons, 16, 100, 0, chosen[:0])) == 0


def test_the_blocks_depend_on_the_seed_alone():
    comparisons = table(random_rows(0))

    def groups(seed):
        found = rows_by_prompt(comparisons, 3, 2, seed)
        return found.rows.tolist(), found.starts.tolist()

    assert groups(0) == groups(0)
    assert groups(0) != groups(1)


def test_many_rows_of_one_prompt():
    # sets without a prompt column: every row's is empty
    size = 20_000
    columns = {
        **dict.fromkeys(("length", "tokens", "prompt_tokens"), [1] * size),
        "better": [[0]] * size,
        "prompt_hash": [0] * size,
        "text_hashes": np.arange(2 * size).reshape(-1, 2).tolist(),
        "text_lengths": [[1, 1]] * size,
    }
    features = datasets.Features({name: FEATURES[name] for name in columns})
    groups = rows_by_prompt(Comparisons(datasets.Dataset.from_dict(columns, features=features)), 16, 100, 0)
    assert sorted(groups.rows) == list(range(size))
    assert sizes(groups) == [8] * (size // 8)


def answers_to(lengths, prompt_hash=0):
    """Single scored answers to a prompt of five tokens; equal lengths, equal texts."""
    return [answer([1] * 5, [10 + n] * n, 0.0, prompt_hash) for n in lengths]


def ranked(responses, prompt_hash=0):
    """A list, best first, all of its pairs judged."""
    better, worse = map(list, zip(*itertools.combinations(range(len(responses)), 2)))
    texts = [[10 + k] * 3 for k in responses]
    return Comparison([1] * 5, texts, better, worse, [0.0] * len(better), prompt_hash, ranks=[*range(len(responses))])


def mixture(seed, prompts=4, rows=60):
    """Pairs, lists of 3 to 5 and single answers, of a few texts of a few prompts."""
    rng = np.random.default_rng(seed)
    found = []
    for size in rng.choice([1, 1, 2, 2, 3, 4, 5], rows):
        prompt, responses = int(rng.integers(prompts)), rng.permutation(7)[:size].tolist()
        found.append(ranked(responses, prompt) if size > 1 else answer([1] * 5, [10 + responses[0]] * 3, 1.0, prompt))
    return [replace(c, prompt=[c.prompt_hash] * (c.prompt_hash + 1)) for c in found]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("limits", [(2, 1, 0), (5, 4, 0), (8, 12, 14), (16, 100, 0), (16, 100, 25)], ids=str)
def test_a_mixture_comes_together_by_prompt(limits, by_row):
    most_responses, most_size, most_tokens = limits
    rows = mixture(0)
    groups = rows_by_prompt(table(rows), most_responses, most_size, 0, most_tokens=most_tokens, by_row=by_row)
    assert sorted(groups.rows) == list(range(len(rows)))
    size_of = [1 if by_row else max(len(c.better), 1) for c in rows]
    assert groups.sizes.tolist() == [size_of[row] for row in groups.rows]
    for u in range(len(groups)):
        group = [rows[row] for row in groups.rows_of(u)]
        texts = {(*c.prompt, *response) for c in group for response in c.responses}
        assert len({c.prompt_hash for c in group}) == 1
        assert groups.size[u] == sum(groups.sizes_of(u)) == sum(size_of[row] for row in groups.rows_of(u))
        assert groups.texts[u] == len(texts)
        assert groups.length[u] == max(map(len, texts))
        assert groups.apart[u] == sum(map(len, texts))
        (merged,) = merge(group, Layout("packed", 0))
        assert groups.tokens[u] == merged.texts.tokens
        if len(group) > 1:
            assert groups.size[u] <= most_size
            assert groups.texts[u] <= most_responses
            assert not most_tokens or groups.tokens[u] <= most_tokens
    if most_responses == 16 and not most_tokens:  # the pairs of each prompt, and the rest
        kinds = {(c.prompt_hash, len(c.responses) == 2) for c in rows}
        assert len(groups) == len(kinds) == 8


@pytest.mark.parametrize(
    ("lengths", "most_responses", "most_size", "most_tokens", "expected"),
    [
        (range(1, 11), 4, 100, 0, [4, 4, 2]),
        (range(1, 11), 16, 3, 0, [3, 3, 3, 1]),
        (range(1, 11), 16, 100, 0, [10]),
        ([7] * 5, 1, 100, 0, [5]),  # one answer, scored five times
        ([7] * 5, 1, 2, 0, [2, 2, 1]),
        ([10, 10, 10], 16, 100, 15, [3]),  # once, after its prompt
        ([8, 8, 9, 9], 16, 100, 22, [4]),  # 5 + 8 + 9
        ([8, 9, 10], 16, 100, 21, [1, 1, 1]),  # any two: 22 at least
        ([8, 9, 10], 16, 100, 1, [1, 1, 1]),
    ],
)
def test_single_answers_by_hand(lengths, most_responses, most_size, most_tokens, expected):
    comparisons, limits = table(answers_to(lengths)), (most_responses, most_size)
    for seed, by_row in enumerate((False, True)):
        groups = rows_by_prompt(comparisons, *limits, seed, most_tokens=most_tokens, by_row=by_row)
        assert sizes(groups) == expected
        assert groups.size.tolist() == np.diff(groups.starts).tolist()


def test_single_answers_of_one_prompt_have_its_tokens_once():
    groups = rows_by_prompt(table([*answers_to([1, 2, 4]), *answers_to([3], 1)]), 16, 100, 0)
    assert groups.texts.tolist() == [3, 1]
    assert groups.length.tolist() == [9, 8]
    assert groups.tokens.tolist() == [5 + 7, 5 + 3]


@pytest.mark.parametrize(
    ("most_responses", "most_size", "by_row", "expected"),
    [
        (5, 100, False, [2]),  # 0 to 4
        (4, 100, False, [1, 1]),
        (16, 12, False, [2]),  # six pairs each
        (16, 11, False, [1, 1]),
        (16, 5, False, [1, 1]),  # a row is a group at least
        (16, 2, True, [2]),
        (16, 1, True, [1, 1]),
    ],
)
def test_lists_with_texts_in_common_by_hand(most_responses, most_size, by_row, expected):
    comparisons = table([ranked([0, 1, 2, 3]), ranked([4, 3, 2, 1])])
    groups = rows_by_prompt(comparisons, most_responses, most_size, 0, by_row=by_row)
    assert sizes(groups) == expected
    assert sorted(groups.size.tolist()) == sorted(n * (1 if by_row else 6) for n in expected)
    assert groups.texts.tolist() == ([5] if expected == [2] else [4, 4])


def test_pairs_among_lists_fill_blocks_of_their_own():
    rows = [*[ranked([a, b]) for a, b in COMPLETE], ranked([0, 1, 2, 3]), *answers_to([3, 4])]
    groups = rows_by_prompt(table(rows), 16, 100, 0)
    assert {frozenset(groups.rows_of(u).tolist()) for u in range(len(groups))} == {
        frozenset(range(6)),
        frozenset({6, 7, 8}),
    }


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("by_prompt", [False, True])
def test_without_a_judged_pair_every_row_counts_one(by_row, by_prompt):
    comparisons = table([*answers_to(range(1, 5)), *answers_to(range(1, 4), 1), *answers_to([1], 2)])
    with np.errstate(all="raise"):
        groups = rows_by_prompt(comparisons, 16, 100, 0, by_row=by_row)
        ((micro_batches,),) = steps_of(groups, BatchSpec(100, 2, by_prompt=by_prompt), 1)
        assert single_rows(comparisons, by_row).size.tolist() == [1] * 8
    assert sum(m.weight for m in micro_batches) == pytest.approx(1)
    found = {}
    for m in micro_batches:
        found |= dict(zip(m.rows.tolist(), (m.weight * m.row_weights / m.row_weights.sum()).tolist()))
    each = [1 / 12] * 4 + [1 / 9] * 3 + [1 / 3] if by_prompt else [1 / 8] * 8
    assert found == pytest.approx(dict(enumerate(each)))


@layouts
def test_each_row_weighs_the_same_in_the_batches_of_a_step(layout):
    rows = mixture(0)
    groups = rows_by_prompt(table(rows), 8, 4, 0, by_row=True)
    plans = [EpochPlan(groups, BatchSpec(4, 2, layout=layout), rank, 3, 0, 0) for rank in range(3)]
    loaded = [PlannedBatches(rows, plan, Layout(layout, 0)) for plan in plans]
    assert len(plans[0]) == 3  # of 24 or so
    for step in range(3):
        batches = [batch for rank in loaded for batch in rank[step]]
        every = np.concatenate([batch.weight * batch.points.row_weights.numpy() for batch in batches if batch.weight])
        np.testing.assert_allclose(every, 1 / len(every), rtol=1e-5)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (2, [[0, 0], [0, 0], [0], [1, 1], [2]]),
        (4, [[0] * 4, [0, 1, 1, 2]]),
        (8, [[0] * 5 + [1, 1, 2]]),
    ],
)
def test_single_answers_are_evaluated_by_prompt(most, expected):
    comparisons = table([*answers_to([9] * 4 + [8]), *answers_to([3, 2], 1), *answers_to([1], 2)])
    plan = plan_evaluation(rows_by_prompt(comparisons, 16, most, 0), BatchSpec(most), 0, 1)
    assert counted([plan]) == list(range(8))
    assert [comparisons.prompt_hashes()[m.rows].tolist() for m in plan] == expected
    assert [(m.weight, m.row_weights.tolist()) for m in plan] == [(1, [1] * len(part)) for part in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_a_plan_are_those_of_its_batches(layout):
    rows = [replace(row, prompt_hash=i) for i, row in enumerate(random_rows(0))]  # nothing to merge
    plan = EpochPlan(single_rows(table(rows)), BatchSpec(4, 2, layout=layout), 0, 1, seed=0, epoch=0)
    batches = [batch for step in PlannedBatches(rows, plan, Layout(layout, 0)) for batch in step]
    written = [batch.tokens.input_ids.numel() for batch in batches]
    assert plan.tokens(steps=10**6) == sum(written)
    assert plan.tokens(steps=1) == sum(written[:2])


def test_one_answer_judged_against_thousands():
    rows = table([pair([], [0], [i], 0) for i in range(1, 3001)])
    groups = rows_by_prompt(rows, 16, 100, 0)
    assert sorted(groups.rows) == list(range(3000))
    assert sorted(sizes(groups)) == [15] * 200


def test_a_unit_beyond_the_budget_is_alone():
    groups = groups_of(np.array([1001, *[10] * 63]))
    ((micro_batches,),) = steps_of(groups, BatchSpec(64, tokens=1000), 1)
    assert sorted(len(m.rows) for m in micro_batches) == [1, 63]


def test_no_pass_is_empty_because_of_a_small_budget():
    (step,) = steps_of(groups_of(np.full(6, 10)), BatchSpec(3, tokens=1), 2)
    assert [[len(m.rows) for m in rank] for rank in step] == [[1] * 3] * 2


def test_groups_keep_to_a_token_budget():
    """Four answers of 10 to a prompt of 5, all six pairs judged: all in 45 tokens, three of them in 35."""
    rows = table([pair([1] * 5, [a] * 10, [b] * 10, 0) for a, b in itertools.combinations((2, 3, 4, 5), 2)])
    found = {most: rows_by_prompt(rows, 16, 100, 0, most_tokens=most) for most in (45, 44, 35, 1)}
    assert {most: max(groups.tokens) for most, groups in found.items()} == {45: 45, 44: 35, 35: 35, 1: 25}
    assert all(sorted(groups.rows) == list(range(6)) for groups in found.values())


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_padded_rows_fill_every_rank(layout):
    """160 tokens, or 320, fit one forward pass of 1,000; four ranks share them all the same."""
    (step,) = steps_of(groups_of(np.full(16, 10)), BatchSpec(4, layout=layout, tokens=1000), 4)
    assert [[len(m.rows) for m in rank] for rank in step] == [[4]] * 4


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_padded_units_of_many_pairs_are_spread(layout):
    """Three groups of 8 pairs and eight of one, in four micro-batches of 8 pairs."""
    groups = replace(groups_of(np.arange(11, 0, -1)), size=np.array([8] * 3 + [1] * 8))
    ((micro_batches,),) = steps_of(groups, BatchSpec(8, 4, layout=layout), 1)
    assert [sum(groups.size[m.rows]) for m in micro_batches] == [8, 8, 8, 8]


EVALUATIONS = [(12, 2, 3), (13, 2, 3), (17, 4, 2), (3, 2, 4), (1, 8, 2), (10, 3, 1)]


@pytest.mark.parametrize(("size", "micro_batch", "world_size"), EVALUATIONS)
@unit_rows
def test_an_evaluation_sees_every_row_once(size, micro_batch, world_size, most_rows):
    groups = random_groups(size, most_rows)
    for spec in rules(micro_batch, 1):
        ranks = [plan_evaluation(groups, spec, rank, world_size) for rank in range(world_size)]
        assert counted(ranks) == list(range(len(groups.rows)))
        assert len({len(plan) for plan in ranks}) == 1
        every = [m for together in zip(*ranks) for m in together]
        fillers = [m for m in every if m.weight == 0]
        assert len(fillers) < world_size
        assert all(len(m.rows) == 1 for m in fillers)
        if most_rows == 1 and not spec.tokens:
            assert len(every) - len(fillers) == math.ceil(size / micro_batch)


@pytest.mark.parametrize(("size", "micro_batch", "world_size"), EVALUATIONS)
@unit_rows
def test_an_evaluation_keeps_its_limits(size, micro_batch, world_size, most_rows):
    groups = random_groups(size, most_rows)
    for spec in rules(micro_batch, 1):
        ranks = [plan_evaluation(groups, spec, rank, world_size) for rank in range(world_size)]
        parts = [m for together in zip(*ranks) for m in together if m.weight]
        assert {m.weight for m in parts} == {1.0}
        assert all(m.row_weights.tolist() == groups.sizes[m.rows].tolist() for m in parts)
        widths = []
        for found in (groups_in(m, groups) for m in parts):
            widths += sorted((spec.width(groups)[u] for u in found), reverse=True)
            if len(found) > 1:
                assert sum(groups.size[u] for u in found) <= micro_batch
                assert not spec.tokens or cost(found, groups, spec.layout) <= spec.tokens
        assert widths == sorted(widths, reverse=True)


def test_the_longest_come_first():
    groups = groups_of([3, 50, 8, 20, 20, 1])
    assert [m.rows.tolist() for m in plan_evaluation(groups, BatchSpec(2), 0, 1)] == [[1, 3], [4, 2], [0, 5]]
    assert [m.rows.tolist() for m in plan_evaluation(groups, BatchSpec(2), 1, 2)] == [
        [4, 2],
        [0],
    ]  # a filler: the shortest


@layouts
def test_a_row_is_as_wide_as_its_unit_or_its_longest_text(layout):
    measures = np.array([[2, 5], [9, 4], [10, 12], [16, 15]])  # texts, length, tokens, apart
    groups = RowGroups(np.arange(2), np.ones(2), np.arange(3), np.ones(2), *measures)
    (first, second) = plan_evaluation(groups, BatchSpec(1, layout=layout), 0, 1)
    assert [*first.rows, *second.rows] == ([0, 1] if layout in ("separate", "unpadded") else [1, 0])


@pytest.mark.parametrize("most", [0, 100, 1000])
def test_all_rows_are_evaluated(most):
    assert rows_to_evaluate(100, most, 0) is None


def test_the_same_random_rows_are_evaluated_every_time():
    rows = rows_to_evaluate(100, 24, 0).tolist()
    assert len(set(rows)) == len(rows) == 24
    assert set(rows) < set(range(100))
    assert rows == rows_to_evaluate(100, 24, 0).tolist() != rows_to_evaluate(100, 24, 1).tolist()
    assert sorted(rows) not in (list(range(24)), list(range(76, 100)))
