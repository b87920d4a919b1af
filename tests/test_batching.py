# SPDX-License-Identifier: Apache-2.0
"""Plans of an epoch and of an evaluation, and collation against a slow reference."""

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from reward_model.batching import Batch, PlannedBatches, collate, plan_epoch, plan_evaluation
from reward_model.data import Comparison

pytestmark = pytest.mark.usefixtures("one_thread")

PAD = 9

# size, micro_batch, accumulation, world_size: whole batches, a short last one, fewer pairs than ranks, one pair
SPLITS = [(24, 2, 3, 2), (23, 2, 3, 2), (25, 2, 3, 2), (7, 4, 1, 1), (3, 2, 2, 8), (1, 1, 1, 4), (100, 3, 4, 5)]


def epoch_of_all_ranks(size, micro_batch, accumulation, world_size, seed=1, epoch=0):
    return [plan_epoch(size, micro_batch, accumulation, rank, world_size, seed, epoch) for rank in range(world_size)]


def global_order(ranks):
    """Indices in the order in which the pairs were dealt out, fillers left out."""
    return [
        int(index)
        for step in zip(*ranks)  # of each rank
        for micro_batches in zip(*step)
        for micro_batch in micro_batches
        if micro_batch.weight
        for index in micro_batch.indices
    ]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_pair_comes_once_an_epoch(split):
    assert sorted(global_order(epoch_of_all_ranks(*split))) == list(range(split[0]))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_rank_takes_part_in_every_micro_batch(split):
    size, micro_batch, accumulation, world_size = split
    ranks = epoch_of_all_ranks(*split)
    steps = math.ceil(size / (micro_batch * accumulation * world_size))
    assert [len(rank) for rank in ranks] == [steps] * world_size
    for step in itertools.chain(*ranks):
        assert len(step) == accumulation
        assert all(1 <= len(m.indices) <= micro_batch for m in step)


def test_the_order_is_the_same_however_it_is_split():
    orders = [global_order(epoch_of_all_ranks(101, *split)) for split in ((4, 1, 1), (2, 2, 2), (1, 1, 8), (3, 5, 4))]
    assert all(order == orders[0] for order in orders)


def test_equal_global_batches_hold_the_same_pairs():
    def batches(*split):
        ranks = epoch_of_all_ranks(50, *split)
        return [sorted(global_order([[step] for step in steps])) for steps in zip(*ranks)]

    assert batches(8, 1, 1) == batches(4, 2, 1) == batches(2, 1, 4) == batches(1, 2, 4)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(**which):
        return global_order(epoch_of_all_ranks(64, 4, 2, 2, **which))

    assert order(seed=5, epoch=3) == order(seed=5, epoch=3)
    distinct = {tuple(order(seed=seed, epoch=epoch)) for seed in (5, 6) for epoch in (0, 1, 2)}
    assert len(distinct) == 6
    assert tuple(range(64)) not in distinct


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_weights_make_the_mean_over_the_global_batch(split):
    size, micro_batch, accumulation, world_size = split
    gradients = np.random.default_rng(0).normal(size=(size, 5))  # of each pair's loss
    ranks = epoch_of_all_ranks(*split)
    order = global_order(ranks)
    per_step = micro_batch * accumulation * world_size
    for i, steps in enumerate(zip(*ranks)):
        parts = [m.weight * gradients[m.indices].mean(axis=0) for step in steps for m in step]
        averaged = sum(parts) / (accumulation * world_size)  # what DeepSpeed makes of them
        expected = gradients[order[i * per_step : (i + 1) * per_step]].mean(axis=0)
        np.testing.assert_allclose(averaged, expected, rtol=1e-12)


def test_weights_by_hand():
    # 3 pairs for 2 ranks of 2: the first gets two, the second one; 2/3 and 1/3 of the batch, times 2 micro-batches
    first, second = (plan_epoch(3, 2, 1, rank, 2, seed=0, epoch=0)[0][0] for rank in (0, 1))
    assert (len(first.indices), first.weight) == (2, pytest.approx(4 / 3))
    assert (len(second.indices), second.weight) == (1, pytest.approx(2 / 3))
    assert all(m.weight == 1.0 for step in plan_epoch(8, 2, 2, 0, 2, seed=0, epoch=0) for m in step)


def test_no_pairs_are_no_steps():
    assert plan_epoch(0, 2, 1, 0, 2, seed=0, epoch=0) == []


EVALUATIONS = [(12, 2, 3), (13, 2, 3), (17, 4, 2), (3, 2, 4), (1, 8, 2), (10, 3, 1)]


def evaluation_of_all_ranks(lengths, micro_batch, world_size, **which):
    return [plan_evaluation(lengths, micro_batch, rank, world_size, **which) for rank in range(world_size)]


def counted(ranks):
    """Indices of all ranks' batches that count."""
    return [int(index) for plan in ranks for m in plan if m.weight for index in m.indices]


@pytest.mark.parametrize(("size", "micro_batch", "world_size"), EVALUATIONS)
def test_an_evaluation_sees_every_pair_once(size, micro_batch, world_size):
    lengths = np.random.default_rng(size).integers(1, 50, size)
    ranks = evaluation_of_all_ranks(lengths, micro_batch, world_size)
    assert sorted(counted(ranks)) == list(range(size))
    assert {m.weight for plan in ranks for m in plan} <= {0.0, 1.0}


@pytest.mark.parametrize(("size", "micro_batch", "world_size"), EVALUATIONS)
def test_every_rank_evaluates_as_many_batches(size, micro_batch, world_size):
    ranks = evaluation_of_all_ranks(np.arange(size), micro_batch, world_size)
    batches = math.ceil(size / micro_batch)
    fillers = sum(m.weight == 0 for plan in ranks for m in plan)
    assert [len(plan) for plan in ranks] == [math.ceil(batches / world_size)] * world_size
    assert fillers == world_size * len(ranks[0]) - batches
    assert all(1 <= len(m.indices) <= micro_batch for plan in ranks for m in plan)


def test_the_longest_come_first():
    lengths = np.array([3, 50, 8, 20, 20, 1])
    (plan,) = evaluation_of_all_ranks(lengths, 2, 1)
    assert [m.indices.tolist() for m in plan] == [[1, 3], [4, 2], [0, 5]]


def test_a_limit_takes_so_many_batches_of_each_rank():
    ranks = evaluation_of_all_ranks(np.arange(100), 4, 2, limit=3)
    assert [len(plan) for plan in ranks] == [3, 3]
    assert len(set(counted(ranks))) == len(counted(ranks)) == 24


def test_a_limit_takes_the_same_random_pairs_every_time():
    def chosen(seed):
        return sorted(counted(evaluation_of_all_ranks(np.arange(100), 4, 2, limit=3, seed=seed)))

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert chosen(0) not in (list(range(24)), list(range(76, 100)))  # neither the first nor the longest


@pytest.mark.parametrize("limit", [0, 13, 1000])
def test_a_limit_beyond_the_set_is_the_whole_set(limit):
    ranks = evaluation_of_all_ranks(np.arange(100), 4, 2, limit=limit)
    assert sorted(counted(ranks)) == list(range(100))


def ids(rng, low, high):
    """Random ids, the pad id among them."""
    return rng.integers(0, PAD + 1, rng.integers(low, high)).tolist()


def random_comparison(rng, responses):
    """K responses that differ in their first token, and some of the pairs among them judged."""
    pairs = list(itertools.combinations(range(responses), 2))
    judged = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(1, len(pairs) + 1)]]
    judged = [pair if rng.random() < 0.5 else pair[::-1] for pair in judged]
    better, worse = map(list, zip(*judged))
    margin = [float(rng.normal()) if rng.random() < 0.5 else math.nan for _ in judged]
    texts = [[k, *ids(rng, 0, 6)] for k in range(responses)]
    return Comparison(ids(rng, 0, 5), texts, better, worse, margin)


def random_comparisons(seed, kinds=(2,), count=5):
    rng = np.random.default_rng(seed)
    return [random_comparison(rng, int(rng.choice(kinds))) for _ in range(count)]


def text_of(batch, row):
    return batch.input_ids[row][batch.attention_mask[row].bool()].tolist()


def first_difference(first, second):
    """Column; at the latest the shorter text's last."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second)) - 1


def judged_pairs(comparisons):
    """Texts of better and worse, margin; in the order in which Comparisons list them."""
    for c in comparisons:
        for better, worse, margin in zip(c.better, c.worse, c.margin):
            yield c.prompt + c.responses[better], c.prompt + c.responses[worse], margin


@pytest.mark.parametrize("kinds", [(2,), (4,), (3, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_collate_agrees_with_a_slow_reference(seed, kinds):
    comparisons = random_comparisons(seed, kinds)
    batch = collate(comparisons, PAD)
    rows = [(c, c.responses[k]) for k in range(max(kinds)) for c in comparisons if k < len(c.responses)]
    width = max(len(c.prompt) + len(response) for c, response in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    for row, (c, response) in enumerate(rows):
        text = c.prompt + response
        padding = width - len(text)
        assert batch.input_ids[row].tolist() == text + [PAD] * padding
        assert batch.attention_mask[row].tolist() == [1] * len(text) + [0] * padding
        assert batch.ends[row] == len(text) - 1
        assert batch.response_lengths[row] == len(response)
    expected = list(judged_pairs(comparisons))
    assert len(expected) == len(batch.better) == len(batch.worse) == len(batch.margin) == len(batch.start)
    for i, (better, worse, margin) in enumerate(expected):
        assert text_of(batch, batch.better[i]) == better
        assert text_of(batch, batch.worse[i]) == worse
        assert batch.margin[i].item() == pytest.approx(margin, nan_ok=True)
        assert batch.start[i] == first_difference(better, worse)


def test_pairs_are_b_chosen_then_b_rejected():
    comparisons = [
        Comparison([1, 2], [[3, 4], [5]], [0], [1], [math.nan]),
        Comparison([6], [[7], [8, 8, 8]], [0], [1], [0.5]),
    ]
    batch = collate(comparisons, PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 9, 9], [1, 2, 5, 9], [6, 8, 8, 8]]
    assert (batch.better.tolist(), batch.worse.tolist()) == ([0, 1], [2, 3])
    assert batch.start.tolist() == [2, 1]
    assert batch.ends.tolist() == [3, 1, 2, 3]
    assert batch.response_lengths.tolist() == [2, 1, 1, 3]
    assert batch.margin[0].isnan()
    assert batch.margin[1] == 0.5


def test_the_second_response_may_be_the_better_one():
    batch = collate([Comparison([1], [[2], [3]], [1], [0], [0.0])], PAD)
    assert (batch.better.tolist(), batch.worse.tolist()) == ([1], [0])


def test_start_is_each_pairs_own():
    # all three share column 0; the second and third also columns 1 and 2
    batch = collate([Comparison([1], [[2, 2, 2], [3, 4, 5], [3, 4, 6]], [0, 0, 1], [1, 2, 2], [0.0] * 3)], PAD)
    assert batch.start.tolist() == [1, 1, 3]


def test_a_text_that_begins_with_all_of_the_other_keeps_a_column_to_compare():
    # as data.compare writes them: the shorter text's last token is its own, though the longer one has it too
    batch = collate([Comparison([1, 2], [[3], [3, 4, 3]], [0], [1], [math.nan])], PAD)
    assert batch.start.tolist() == [2]
    assert (batch.start <= torch.minimum(batch.ends[batch.better], batch.ends[batch.worse])).all()


def test_a_pad_id_inside_a_text_is_text():
    batch = collate([Comparison([PAD, 1], [[PAD, 2, PAD], [3]], [0], [1], [0.0])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.ends.tolist() == [4, 2]


def test_an_empty_prompt_starts_at_column_0():
    batch = collate([Comparison([], [[1, 2], [2]], [0], [1], [0.0])], PAD)
    assert batch.start.tolist() == [0]
    assert batch.response_lengths.tolist() == [2, 1]


def test_dtypes():
    batch = collate(random_comparisons(0), PAD, weight=0.25)
    integers = {f.name for f in fields(Batch)} - {"margin", "weight"}
    assert {getattr(batch, name).dtype for name in integers} == {torch.int64}
    assert batch.margin.dtype == torch.float32
    assert batch.weight == 0.25


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate(random_comparisons(0, (2, 3)), PAD, weight=0.25)
    moved = batch.to(torch.device("meta"))
    same = batch.to(torch.device("cpu"))
    assert moved.weight == same.weight == 0.25
    tensors = [f.name for f in fields(Batch) if f.name != "weight"]
    for name in tensors:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        torch.testing.assert_close(getattr(same, name), getattr(batch, name), equal_nan=True)


def test_planned_batches_are_those_of_the_plan():
    comparisons = random_comparisons(0, count=7)
    plan = plan_epoch(7, 2, 2, 1, 2, seed=0, epoch=0)[0]
    batches = PlannedBatches(comparisons, plan, PAD)
    assert len(batches) == len(plan) == 2
    for batch, micro_batch in zip(batches, plan):
        expected = collate([comparisons[i] for i in micro_batch.indices], PAD)
        assert batch.weight == micro_batch.weight
        assert batch.input_ids.tolist() == expected.input_ids.tolist()
