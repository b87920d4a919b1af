# SPDX-License-Identifier: Apache-2.0
"""The reward function of an OpenRLHF run, from a model that a run of ours has saved.

REWARD_MODEL=demo/output python -m openrlhf.cli.train_ppo_ray --reward.remote_url openrlhf_reward.py …

``REWARD_DEVICE`` is ``cpu`` unless it says otherwise (``cuda:7``). The package has to be installed where OpenRLHF runs
(``pip install`` this checkout), or the file has to stay in this folder.
"""

import functools
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's package, installed or not

import torch

import reward_model

ONE_AT_A_TIME = threading.Lock()  # OpenRLHF calls from several threads, with one query each


@functools.cache
def scorer():
    """The model, read once."""
    folder = os.environ.get("REWARD_MODEL")
    if not folder:
        raise reward_model.UserError("REWARD_MODEL has to name a folder that a run has saved")
    return reward_model.load(folder, device=os.environ.get("REWARD_DEVICE", "cpu"))


def reward_func(queries, prompts, labels, **others):
    """Rewards of texts with their special tokens, as OpenRLHF decodes them.

    Args:
        queries: prompts with their responses.
        prompts: of the queries.
        labels: not looked at, as a reward model knows no right answers.
    """
    with ONE_AT_A_TIME:
        scores = torch.tensor(scorer().score_queries(queries, prompts))
    return {"rewards": scores, "scores": scores, "extra_logs": {"reward_model_score": scores}}
