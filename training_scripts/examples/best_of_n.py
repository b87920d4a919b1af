#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Best of n: let a causal model answer a prompt n times, and print the answer that the reward model likes best.

python best_of_n.py --policy demo/model --reward demo/output --prompt "Human: How do I clean a lamp? Assistant:" --n 8
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's package, installed or not

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="demo/model", help="the model that answers: a folder or a hub name")
    parser.add_argument("--reward", default="demo/output", help="a folder that a run has saved")
    parser.add_argument("--prompt", required=True, help="as the policy expects it, such as 'Human: … Assistant:'")
    parser.add_argument("--n", type=int, default=8, help="how many answers to draw")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="the longest answer, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.policy, trust_remote_code=False)
    policy = AutoModelForCausalLM.from_pretrained(options.policy, trust_remote_code=False)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    drawn = policy.generate(
        **prompt,
        do_sample=True,
        num_return_sequences=options.n,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(drawn[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = reward_model.load(options.reward).score([options.prompt] * options.n, answers)
    best = max(range(options.n), key=scores.__getitem__)
    print(f"scores: {', '.join(f'{score:.3f}' for score in scores)}")
    print(f"best ({scores[best]:.3f}):{answers[best]}")


if __name__ == "__main__":
    try:
        main()
    except reward_model.UserError as error:
        sys.exit(f"error: {error}")
