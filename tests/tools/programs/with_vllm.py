# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline API on a folder, on a CPU, with as little memory as it takes."""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import gc
import traceback
from importlib.metadata import version

from answers import answer_all
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

SMALL = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 8, "enforce_eager": True}
VERSIONS = {"version": version("vllm-cpu"), "transformers": version("transformers")}


def asked(question):
    try:
        return VERSIONS | ask(question)
    except Exception as error:  # the other models are asked all the same
        traceback.print_exc()
        return VERSIONS | {"error": repr(error)}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()  # else the next model finds the process groups of this one


def ask(question):
    model = LLM(question["folder"], runner="pooling", dtype=question["dtype"], **SMALL, **question.get("options", {}))
    found = {}
    if texts := question.get("texts"):
        found["texts"] = [each.outputs.probs[-1] for each in model.classify(texts, use_tqdm=False)]
    if ids := question.get("ids"):
        prompts = [{"prompt_token_ids": each} for each in ids]
        found["ids"] = [each.outputs.probs[-1] for each in model.classify(prompts, use_tqdm=False)]
    if embedded := question.get("embedded"):
        found["embedded"] = [each.outputs.embedding[-1] for each in model.embed(embedded, use_tqdm=False)]
    if pairs := question.get("pairs"):
        found["pairs"] = [each.outputs.score for each in model.score(*pairs, use_tqdm=False)]
    return found


if __name__ == "__main__":
    answer_all(asked)
