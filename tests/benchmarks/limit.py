# SPDX-License-Identifier: Apache-2.0
"""How fast this machine multiplies matrices of the model's own shapes: a bound on any trainer's tokens per second.

Forward and both backward products of every linear layer, and nothing else: no attention, no norms, no optimizer.
``python limit.py FOLDER --rows TOKENS --dtype fp32`` prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = 0.3  # for each product


def linear_shapes(model_folder: Path) -> Counter[tuple[int, int]]:
    """(features in, features out) of every linear layer, and how many there are of it."""
    config = AutoConfig.from_pretrained(model_folder, num_labels=1)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    layers = (part for part in model.modules() if isinstance(part, torch.nn.Linear))
    return Counter((layer.in_features, layer.out_features) for layer in layers)


def seconds_of(first: torch.Tensor, second: torch.Tensor) -> float:
    """Median time of a product: CPU seconds of all threads, or wall seconds on a GPU."""
    on_gpu = first.is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    repeats = 10 if on_gpu else 1  # a launch takes microseconds, the wait at the end likewise
    out = torch.mm(first, second)
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = clock()
        for _ in range(repeats):
            torch.mm(first, second, out=out)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((clock() - start) / repeats)
    return statistics.median(times)


def measure(model_folder: Path, rows: int, dtype: torch.dtype, device: str) -> dict:
    """Tokens per second, forward and backward, and the rate in floating-point operations per second."""
    total, operations = 0.0, 0
    for (features_in, features_out), layers in linear_shapes(model_folder).items():
        x = torch.randn(rows, features_in, dtype=dtype, device=device)
        weight = torch.randn(features_out, features_in, dtype=dtype, device=device)
        gradient = torch.randn(rows, features_out, dtype=dtype, device=device)
        products = ((x, weight.T), (gradient, weight), (gradient.T, x))
        total += layers * sum(seconds_of(*product) for product in products)
        operations += layers * 3 * 2 * rows * features_in * features_out
    return {"rows": rows, "tokens_per_second": rows / total, "flops_per_second": operations / total}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the work: holds model/")
    parser.add_argument("--rows", type=int, required=True, help="tokens of a step")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    given = parser.parse_args()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(measure(given.folder / "model", given.rows, DTYPES[given.dtype], place) | {"device": place}))
