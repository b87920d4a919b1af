# SPDX-License-Identifier: Apache-2.0
"""Texts shared by several processes (``--sequence_parallel_size``): the run of one process, and what is refused."""

import models
import pytest
import runs
import torch

from reward_model.common.distributed import DistributedContext, share_texts
from reward_model.common.errors import UserError

SMALL = ("--max_train_samples", 96, "--per_device_train_batch_size", 16, "--num_train_epochs", 2)


def assert_same(one, other):
    assert "processes share each text\n" in other.output
    assert other.losses == pytest.approx(one.losses, abs=2e-5)
    for name in ("pairs", "accuracy", "loss", "chosen_mean", "rejected_std"):
        assert other.final[name] == pytest.approx(one.final[name], abs=2e-5), name
    assert [record["pairs"] for record in other.train] == [record["pairs"] for record in one.train]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--loss_level token --zero_stage 2", "--zero_stage 3 --lora_dim 4"])
def test_two_processes_train_as_one_does(flags, demo, tmp_path):
    one = runs.train(demo, tmp_path / "one", *SMALL, *flags.split(), "--attention", "separate")
    two = runs.train(demo, tmp_path / "two", *SMALL, *flags.split(), "--sequence_parallel_size", 2, processes=2)
    assert_same(one, two)
    for name in ("tokens", "micro_batches", "rows"):
        assert [record.get(name) for record in two.train] == [record.get(name) for record in one.train], name


@pytest.mark.slow
def test_two_groups_of_two(demo, tmp_path):
    one = runs.train(demo, tmp_path / "one", *SMALL, "--attention", "separate")
    flags = [*SMALL[:2], "--per_device_train_batch_size", 8, *SMALL[4:], "--sequence_parallel_size", 2]
    four = runs.train(demo, tmp_path / "four", *flags, "--zero_stage", 1, processes=4)
    assert "1 accumulated × 2 groups of 2 processes that share texts" in four.output
    assert_same(one, four)


def test_an_attention_that_cannot_be_divided_ends_in_a_line(demo, tmp_path):
    """Gemma 2 caps its products, which torch's function for whole texts does not know."""
    models.write("gemma2", tmp_path / "gemma2", max_position_embeddings=256)
    flags = ["--model_name_or_path", tmp_path / "gemma2", "--data_path", demo / "data", "--sequence_parallel_size", 2]
    result = runs.launch(*flags, processes=2)
    assert result.returncode == 1
    assert "error: --sequence_parallel_size 2: softcap in the attention of Gemma2Attention" in result.stderr
    assert "Traceback" not in result.stderr


def test_processes_that_are_no_multiple():
    context = DistributedContext(0, 3, torch.device("cpu"))
    assert share_texts(context, 1) is context
    with pytest.raises(UserError, match="--sequence_parallel_size 2: 3 processes are no multiple of it"):
        share_texts(context, 2)


def test_shares_of_the_rows_are_those_of_groups():
    from reward_model.common.distributed import SequenceGroup

    places = [DistributedContext(rank, 4, torch.device("cpu"), SequenceGroup(rank % 2, 2)) for rank in range(4)]
    assert [(place.data_rank, place.data_size) for place in places] == [(0, 2), (0, 2), (1, 2), (1, 2)]
