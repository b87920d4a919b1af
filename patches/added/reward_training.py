# SPDX-License-Identifier: Apache-2.0
"""What step 2 counts: every pair of an evaluation once, and every micro-batch of an epoch in some step."""

import torch
from torch.utils.data.distributed import DistributedSampler

from .utils import print_rank_0, to_device


def evaluation_reward(model, dataloader, eval_iters=None):
    """Mean score of chosen and of rejected answers, and the share of pairs in order, over all ranks.

    Args:
        model: the DeepSpeed engine.
        dataloader: its batches have the same number on every rank.
        eval_iters: stop after so many batches; None: at the end.

    Returns:
        Three floats; NaN where there is no row. A row that the sampler repeats, so that all ranks have as many, counts
        once.
    """
    model.eval()
    rows = len(dataloader.dataset)
    sampler = dataloader.sampler
    if isinstance(sampler, DistributedSampler):  # deals rows out in turn, repeats at the end
        rows = len(range(sampler.rank, rows, sampler.num_replicas))
    totals = torch.zeros(4, dtype=torch.float64, device=model.device)  # chosen, rejected, in order, pairs
    for step, batch in enumerate(dataloader):
        with torch.no_grad():
            outputs = model(**to_device(batch, model.device))
        chosen = outputs["chosen_mean_scores"][:rows].double()
        rejected = outputs["rejected_mean_scores"][:rows].double()
        rows = max(0, rows - len(outputs["chosen_mean_scores"]))
        totals += torch.stack([chosen.sum(), rejected.sum(), (chosen > rejected).sum(), chosen.new_tensor(len(chosen))])
        if step + 1 == eval_iters:
            break
    torch.distributed.all_reduce(totals)
    chosen_score, rejected_score, accuracy, pairs = totals.tolist()
    if not pairs:
        print_rank_0("no rows to evaluate on: --data_split left none for this step")
        return (float("nan"),) * 3
    return chosen_score / pairs, rejected_score / pairs, accuracy / pairs


def accumulation_weight(engine, step, steps):
    """Close the epoch's last group of micro-batches, complete or not, with an optimizer step.

    Args:
        engine: the DeepSpeed engine.
        step, steps: the micro-batch of the epoch, from 0, and their number.

    Returns:
        What to multiply the loss by. DeepSpeed divides by the number of accumulation steps; in an incomplete group that
        is too much.
    """
    group = engine.gradient_accumulation_steps()
    left = steps % group
    last = step + 1 == steps
    engine.set_gradient_accumulation_boundary(last or (step + 1) % group == 0)
    return group / left if step >= steps - left else 1.0
