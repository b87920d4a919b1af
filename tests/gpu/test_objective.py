# SPDX-License-Identifier: Apache-2.0
"""Every objective gives on a GPU what it gives on a CPU, without waiting for the GPU once.

That none waits is shown without a GPU too, in test_fake_cuda.py, and there with the model around it. What remains to
this file: the numbers, and the copies from host memory that fake tensors do not notice.
"""

import pytest
import torch
from flags import loss_of

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.config.objectives import LIST_LOSSES, PAIR_LOSSES, POINT_LOSSES
from reward_model.data.comparisons import Comparison
from reward_model.data.rows import judge_answer, judge_list, judge_pair
from reward_model.objectives.objective import Objective
from reward_model.reward_model import SCORE_PENALTIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OWN_FLAGS = {"scaled": "--margin large", "prior_cosine": "--prior_model none", "logistic": "--label_smoothing column"}
FLAGS = [f"--loss {name} {OWN_FLAGS.get(name, '')}" for name in (*PAIR_LOSSES, *LIST_LOSSES, *POINT_LOSSES)]
FLAGS += [f"--loss logistic mse --length_penalty 1 --score_penalty {kind}" for kind in SCORE_PENALTIES]


@pytest.mark.parametrize("flags", FLAGS)
def test_a_gpu_computes_what_a_cpu_does(flags):
    pair = judge_pair({"rating": 2, "probability": 0.75, "chosen_score": 1, "rejected_score": 0})
    ranked = judge_list(3, [1.0, 0.0, 2.0]) | {"rating": [2.0] * 3, "probability": [0.75] * 3}
    rows = [
        Comparison([1], [[2, 8], [3, 9, 8]], similarity=[0.5], **pair),
        Comparison([4], [[5], [6], [7, 8]], similarity=[0.1, 0.2, 0.3], **ranked),
        Comparison([4], [[9, 9]], **judge_answer({"label": 1})),
    ]
    batch = collate(rows, Layout("packed", 0), row_weights=[1, 1, 1])
    objective = Objective(loss_of(flags))
    found = []
    for device in ("cpu", "cuda"):
        scores = torch.linspace(-1, 1, len(batch.tokens.ends)).to(device).requires_grad_()
        thresholds = torch.tensor([-0.5, 0.5], device=device)
        there = batch.to(torch.device(device))
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            loss = objective(there, scores, thresholds=thresholds)
            (gradient,) = torch.autograd.grad(loss, scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((loss.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1], found[0])
