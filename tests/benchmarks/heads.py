# SPDX-License-Identifier: Apache-2.0
"""What K score heads cost beside one: time of a step and memory, side by side on the same batches.

python heads.py                       1, 8 and 64 heads on a small LLaMA with random weights
python heads.py --heads 1 8 --hidden 768 --layers 12 --dtype bf16

A step is the forward pass with shared prompts, the loss, the backward pass and AdamW, as the trainer has them, without
DeepSpeed, which does not know how many heads there are. The models take turns, step by step, so that whatever else the
machine does slows all of them; a ratio is the median over the steps of one model's time over that of one head in the
same turn. On a CPU, time is the process's own, however many others run. Memory is the peak of a process that trains one
model alone; on a CPU with its libraries, as Linux tells it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reward_model.batching.collate import collate
from reward_model.config.groups import LossConfig
from reward_model.config.loss import resolve_loss
from reward_model.data.comparisons import Comparison
from reward_model.models.attention import ON_CPU, ON_CUDA
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.objectives.objective import Objective

VOCABULARY, BATCHES, WARMUP = 8192, 4, 3


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A LLaMA with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=hidden // 64, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def rows(pairs: int, tokens: int) -> list[list[Comparison]]:
    """Batches of pairs, half of whose tokens are the prompt's."""
    chance = np.random.default_rng(0)

    def text(count: int) -> list[int]:
        return chance.integers(2, VOCABULARY, count).tolist()

    return [
        [
            Comparison(text(tokens // 2), [text(tokens // 2), text(tokens // 2)], [0], [1], [0.0], i)
            for i in range(pairs)
        ]
        for _ in range(BATCHES)
    ]


class Model:
    """A model with K heads that takes steps."""

    def __init__(self, folder: Path, heads: int, options: argparse.Namespace, device: torch.device):
        dtype = DTYPES[options.dtype]
        self.scorer = load_for_training(str(folder), dtype, seed=1, heads=heads, anchored=heads > 1).to(device).train()
        self.forward = ForwardPass(self.scorer, self.scorer, dtype, device, pad=0)
        self.forward.use((ON_CUDA if device.type == "cuda" else ON_CPU)[0])
        self.objective = Objective(resolve_loss(LossConfig()))
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=1e-5, fused=True)
        made = rows(options.pairs, options.tokens)
        self.batches = [collate(batch, self.forward.layout, identified=heads > 1).to(device) for batch in made]

    def step(self, number: int) -> float:
        """Seconds of a step."""
        begun = self.now()
        batch = self.batches[number % BATCHES]
        scores = self.forward(batch, batch.tokens.ends)
        loss = self.objective(batch, scores, None, None, self.forward.heads)
        if self.forward.anchor is not None:
            loss = loss + 0.01 * self.forward.anchor
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.now() - begun

    def now(self) -> float:
        if self.forward.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def peak(folder: Path, heads: int, options: argparse.Namespace) -> int:
    """Bytes at the peak of a process that trains a model with so many heads alone."""
    words = [sys.executable, __file__, "--alone", str(folder), "--heads", str(heads), "--dtype", options.dtype]
    words += ["--pairs", str(options.pairs), "--tokens", str(options.tokens)]
    return int(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 8, 64], help="the first is compared with")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=128, help="of a text")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.alone:
        model = Model(options.alone, options.heads[0], options, device)
        for number in range(2 * BATCHES):
            model.step(number)
        on_host = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # not the parent's
        print(torch.cuda.max_memory_allocated() if device.type == "cuda" else on_host)
        return
    with TemporaryDirectory() as place:
        write_model(Path(place), options.hidden, options.layers)
        found = [Model(Path(place), heads, options, device) for heads in options.heads]
        turns = [[model.step(number) for model in found] for number in range(WARMUP + options.steps)][WARMUP:]
        memory = [peak(Path(place), heads, options) for heads in options.heads]
    for heads, seconds, size in zip(options.heads, zip(*turns), memory):
        ratios = [own / turn[0] for own, turn in zip(seconds, turns)]
        spread = statistics.quantiles(ratios, n=4)
        print(
            f"{heads} heads: {1e3 * statistics.median(seconds):.1f} ms a step, {statistics.median(ratios):.3f} of the "
            f"first [{spread[0]:.3f}, {spread[2]:.3f}]; {size / 1e6:.1f} MB at the peak, {size / memory[0]:.3f}"
        )


if __name__ == "__main__":
    main()
