# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF at work: its reward model on a saved folder, its rewards from a file, and a model that it trains."""

import asyncio
import os
import sys
import types
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
from answers import answer_all


def absent(name, **members):
    """A stand-in for a package that only a GPU has; nothing here calls it."""
    module = types.ModuleType(name)
    module.__dict__.update(members, __spec__=types.SimpleNamespace(origin=None), __path__=[])
    sys.modules[name] = module


absent("flash_attn")
absent("flash_attn.utils")
absent("flash_attn.bert_padding", **dict.fromkeys(("index_first_axis", "pad_input", "rearrange", "unpad_input")))
absent("flash_attn.utils.distributed", all_gather=None)

from openrlhf.models import PairWiseLoss, get_llm_for_sequence_regression, model  # noqa: F401
from openrlhf.utils import get_tokenizer, utils

VERSION = version("openrlhf")
dtype_of = utils.convert_to_torch_dtype


def load(folder, dtype="bf16", **options):
    """Its reward model. float32 is no choice of its own, and is put in the place of one."""
    utils.convert_to_torch_dtype = (lambda name: torch.float32) if dtype == "float32" else dtype_of
    return get_llm_for_sequence_regression(folder, "reward", attn_implementation="eager", **options)


def scores_of(reward, tokenizer, texts):
    """As ``serve_rm`` scores texts: no special tokens are added, and a batch is padded on the left."""
    batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
    with torch.no_grad():
        return reward.eval()(batch["input_ids"], batch["attention_mask"]).float().tolist()


def score(asked):
    reward = load(asked["folder"], asked["dtype"], normalize_reward=asked.get("normalize", False))
    tokenizer = get_tokenizer(asked["folder"], reward)
    return {"version": VERSION, "scores": scores_of(reward, tokenizer, asked["texts"]), "mean": reward.mean.tolist()}


def function(asked):
    """The rewards that its executor gets from a file."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    os.environ["REWARD_MODEL"] = asked["model"]  # its executor reads the file anew, and that the model
    executor = SingleTurnAgentExecutor([asked["file"]])
    labels = [""] * len(asked["texts"])
    found = asyncio.run(executor._fetch_rewards_via_func(asked["texts"], asked["prompts"], labels))
    return {"version": VERSION, "scores": [entry["rewards"].item() for entry in found]}


def train(asked):
    """A few steps by its loss, saved by its own ``save_model``; its scores of the texts."""
    from openrlhf.utils.deepspeed import deepspeed as strategies

    strategies.torch_dist_barrier_and_cuda_sync = lambda: None
    strategy = strategies.DeepspeedStrategy.__new__(strategies.DeepspeedStrategy)
    strategy.args = MagicMock()
    strategy.args.ds.zero_stage, strategy.args.ds.tensor_parallel_size = 2, 1
    strategy.ds_tensor_parallel_size, strategy.stage = 1, 2
    strategy.is_rank_0 = lambda: True
    strategy._unwrap_model = lambda each: each
    torch.manual_seed(0)
    lora = {"lora_rank": 4, "target_modules": "all-linear"} if asked["lora"] else {}
    reward = load(asked["folder"], "float32", init_value_head=True, value_head_prefix=asked["head"], **lora)
    tokenizer = get_tokenizer(asked["folder"], reward)
    optimizer = torch.optim.AdamW([each for each in reward.parameters() if each.requires_grad], lr=1e-2)
    texts = asked["texts"]  # chosen, then rejected
    batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
    for _ in range(6):
        found = reward.train()(batch["input_ids"], attention_mask=batch["attention_mask"])
        half = len(texts) // 2
        PairWiseLoss()(found[:half], found[half:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    reward.config.value_head_prefix = asked["head"]  # as train_rm does before it saves
    strategy.save_model(reward, tokenizer, asked["output"])
    trained = [name for name, each in reward.named_parameters() if each.requires_grad and asked["head"] in name]
    return {"version": VERSION, "scores": scores_of(reward, tokenizer, texts), "head_trained": bool(trained)}


DO = {"score": score, "function": function, "train": train}

if __name__ == "__main__":
    answer_all(lambda question: DO[question["do"]](question))
