#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Score rows of a JSON Lines file, which have a prompt and a response, and write them with their score.

python score_texts.py --model demo/output --rows answers.jsonl > scored.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's package, installed or not

import reward_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/output", help="a folder that a run has saved")
    parser.add_argument("--rows", required=True, help='lines such as {"prompt": "2 + 2?", "response": " 4"}')
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    options = parser.parse_args()

    reward = reward_model.load(options.model, device=options.device)
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not {"prompt", "response"} <= row.keys():
            raise reward_model.UserError(f"{options.rows}, row {number}: it needs a prompt and a response")
    scores = reward.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    for row, score in zip(rows, scores):
        print(json.dumps(row | {"score": score}, ensure_ascii=False))


if __name__ == "__main__":
    try:
        main()
    except reward_model.UserError as error:
        sys.exit(f"error: {error}")
