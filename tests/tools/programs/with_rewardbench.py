# SPDX-License-Identifier: Apache-2.0
"""rewardbench's own runner on a folder, with rows of a JSON file, on a CPU."""

import json
from importlib.metadata import version
from pathlib import Path

from answers import answer_all
from datasets import Dataset
from transformers import BatchEncoding

to = BatchEncoding.to  # its pipeline says "cuda" in any case
BatchEncoding.to = lambda self, device, **rest: to(self, "cpu" if device == "cuda" else device, **rest)
map_in_processes = Dataset.map  # eight of them, for eight rows
Dataset.map = lambda self, *rest, num_proc=None, **options: map_in_processes(self, *rest, **options)

from rewardbench.rewardbench import Args, rewardbench

VERSIONS = {"version": version("rewardbench"), "transformers": version("transformers")}


def asked(question):
    flags = {"dataset": question["rows"], "load_json": True, "not_quantized": True, "torch_dtype": question["dtype"]}
    folder = question["folder"]
    rewardbench(Args(model=folder, output_dir=question["output"], batch_size=4, max_length=512, **flags))
    lines = (
        Path(f"{folder}_outputs.jsonl").read_text().splitlines()
    )  # a model that begins with a slash replaces the folder
    rows = [json.loads(line) for line in lines]
    return VERSIONS | {
        "chosen": [row["scores_chosen"] for row in rows],
        "rejected": [row["scores_rejected"] for row in rows],
    }


if __name__ == "__main__":
    answer_all(asked)
