# SPDX-License-Identifier: Apache-2.0
"""Steps of the real trainer and engine on a LLaMA of a given shape, with random weights and pairs as long as real ones.

Nothing is read from disk or written to it, so that what is measured is the step alone; batches are made beforehand.
What a process starts (the communication) stays until its end, so that one process measures many cases.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import work
from ledger import place_of_a_wait
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, LlamaConfig

from reward_model.batching.batch import Batch, PackedBatch
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common import distributed
from reward_model.config.options import parse
from reward_model.config.settings import resolve
from reward_model.data.comparisons import Comparison
from reward_model.models.attention import ON_CPU, ON_CUDA, SEPARATE, AttentionBackend
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, multiply_in_float32
from reward_model.objectives.objective import Objective
from reward_model.training.engine import start_engine
from reward_model.training.records import Records
from reward_model.training.step_log import StepLog
from reward_model.training.stopping import StopRequest
from reward_model.training.trackers import Trackers
from reward_model.training.trainer import Trainer

WAYS = {backend.name: backend for backend in (*ON_CUDA, SEPARATE)}
if not torch.cuda.is_available():  # a rehearsal: FlexAttention has a reference on a CPU, the kernel of varlen has none
    WAYS |= {backend.name: backend for backend in ON_CPU if backend.name == "varlen"}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L4": 121e12}  # dense bfloat16, NVIDIA
WARMUP, TIMED, BATCHES = 5, 20, 5  # steps before, steps timed, different batches


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA. limit: tokens of a text."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    vocabulary: int
    limit: int = 512

    def config(self, **more) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=8192,
            num_labels=1,
            pad_token_id=work.PAD,
            bos_token_id=None,
            eos_token_id=work.END,
            **more,
        )

    @property
    def multiplied(self) -> int:
        """Weights that each token is multiplied by: of the linear layers, and not the embedding's."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def operations(self, pairs: Sequence[work.Pair], adapters: bool = False) -> float:
        """Floating-point operations of a forward and backward pass with each prompt computed once, and no pad.

        adapters: the weights themselves have no gradients.
        """
        seen = 0  # pairs of a query and a key that it sees
        for pair in pairs:
            prompt, answers = len(pair.prompt), [len(pair.chosen) + 1, len(pair.rejected) + 1]
            seen += prompt * (prompt + 1) // 2 + sum(a * prompt + a * (a + 1) // 2 for a in answers)
        each = (4 if adapters else 6) * self.multiplied
        return each * work.tokens_once(list(pairs)) + 12 * self.hidden * self.layers * seen


SHAPES = {
    "1B": Shape(16, 2048, 8192, 32, 8, 128_256),
    "8B, 8 layers": Shape(8, 4096, 14_336, 32, 8, 128_256),
    "small": Shape(2, 64, 128, 4, 2, 512, limit=64),
}


def draw(shape: Shape, number: int, lengths: str = "hh_rlhf_harmless_base") -> list[work.Pair]:
    """So many pairs, as long as those of a data set."""
    return work.Draw(shape.vocabulary, shape.limit).pairs(work.read_lengths(lengths), number)


def comparison(pair: work.Pair) -> Comparison:
    """A pair as the trainer's data has it."""
    texts, prompt = pair.texts, len(pair.prompt)
    return Comparison(texts[0][:prompt], [text[prompt:] for text in texts], [0], [1], [0.0])


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def packed(pairs: Sequence[work.Pair], layout: Layout, device: torch.device) -> PackedBatch:
    """A batch as the loader hands it to the trainer."""
    batch = collate([comparison(pair) for pair in pairs], layout).packed()
    return batch.pin_memory() if on_gpu(device) else batch


class Steps:
    """A trainer of a shape that takes steps on given batches.

    flags: of main.py. change: of DeepSpeed's configuration before it starts.
    """

    def __init__(self, shape: Shape, flags: str, way: AttentionBackend, change: Callable[[dict], None] | None = None):
        self.shape, config = shape, parse(["--model_name_or_path", "random", *flags.split()])
        self.context = distributed.start()
        device = self.context.device
        settings = resolve(
            config, distributed.default_dtype(), 1, shape.hidden, shape.vocabulary, on_gpu=on_gpu(device)
        )
        if change:
            change(settings.deepspeed.config)
        self.dtype = DTYPES[settings.engine.dtype]
        self.scorer = random_scorer(shape.config(), self.dtype, device)
        model = settings.model
        if model.gradient_checkpointing:
            self.scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if model.lora_dim:
            add_lora(self.scorer, model.lora_dim, model.lora_alpha or model.lora_dim, model.lora_module_name)
        engine = start_engine(settings, self.scorer, steps=10_000)
        forward = ForwardPass(engine, self.scorer, self.dtype, device, work.PAD)
        forward.use(way)
        objective, records = Objective(settings.loss), Records(None, Trackers(), True)
        train, held_out, steps = (None, None), {"": (None, None)}, ([10_000], 10_000)
        self.trainer = Trainer(
            settings,
            self.context,
            engine,
            forward,
            objective,
            None,
            records,
            train,
            held_out,
            steps,
            None,
            StopRequest(),
        )
        self.log = StepLog(self.context, records, tqdm(disable=True), self.trainer.health)
        engine.train()

    def step(self, batch: PackedBatch | Batch) -> None:
        """What the trainer's loop does with a batch that is a whole step."""
        trainer, engine = self.trainer, self.trainer.engine
        engine.set_gradient_accumulation_boundary(True)
        trainer.train_micro_batch(batch.to(self.context.device), self.log)
        trainer.step += 1
        rate, norm = engine.get_lr()[0], engine.get_global_grad_norm()
        self.log.end_step(trainer.step, 0.0, rate, norm, trainer.guard.after_step(), lambda: np.zeros(0, int))

    def close(self) -> None:
        """Give the memory back."""
        self.log.flush()
        self.trainer.engine.destroy()
        self.trainer.engine = self.trainer.forward = self.scorer = None
        gc.collect()
        if on_gpu(self.context.device):
            torch.cuda.empty_cache()


def random_scorer(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Scorer:
    torch.manual_seed(work.SEED)
    with device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    multiply_in_float32(model)
    return Scorer(model, "last").train()


def seconds_of(do: Callable[[int], None], times: int, device: torch.device) -> list[float]:
    """Seconds of each of several calls, by events on a GPU, which wait for nothing in between."""
    if not on_gpu(device):
        found = []
        for number in range(times):
            start = time.perf_counter()
            do(number)
            found.append(time.perf_counter() - start)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for number in range(times):
        do(number)
        marks[number + 1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]


def waits_of(do: Callable[[], None], device: torch.device) -> dict[str, int] | None:
    """Place → how often a call made the host wait for the GPU, as PyTorch warns of it; None: there is no GPU."""
    if not on_gpu(device):
        return None
    places: Counter[str] = Counter()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: places.update(
                [place_of_a_wait()] if "synchroniz" in str(message) else []
            )
            do()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(places)


def measure(
    shape: Shape,
    pairs: int,
    way: str,
    flags: str,
    change: Callable[[dict], None] | None = None,
    unpack: bool = False,
    timed: int = TIMED,
) -> dict:
    """Tokens a second, share of the GPU's peak, peak memory and waits of steps of so many pairs.

    unpack: hand the trainer a batch of many tensors instead of one buffer.
    """
    work_of = draw(shape, pairs * BATCHES)
    steps = Steps(shape, f"{flags} --per_device_train_batch_size {pairs}", WAYS[way], change)
    device = steps.context.device
    try:
        shares = [work_of[i * pairs : (i + 1) * pairs] for i in range(BATCHES)]
        layout = steps.trainer.forward.layout
        batches: list = [packed(share, layout, device) for share in shares]
        if unpack:
            batches = [pinned_apart(share, layout, device) for share in shares]
        for batch in batches[: max(WARMUP, BATCHES)]:
            steps.step(batch)
        if on_gpu(device):
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(lambda number: steps.step(batches[number % BATCHES]), timed, device)
        held = torch.cuda.max_memory_allocated() if on_gpu(device) else None
        waits = waits_of(lambda: steps.step(batches[0]), device)
        done = batches[0].to(device).tokens.input_ids.numel()
    finally:
        steps.close()
    useful = work.tokens_once(work_of) / BATCHES
    rate = statistics.mean(shape.operations(share, "--lora" in flags) for share in shares) / statistics.median(seconds)
    return {
        "seconds_a_step": statistics.median(seconds),
        "slowest": max(seconds),
        "tokens_per_second": useful / statistics.median(seconds),
        "computed_tokens_of_a_step": done,
        "operations_per_second": rate,
        "share_of_peak": rate / peak() if on_gpu(device) and math.isfinite(peak()) else None,
        "bytes_held": held,
        "waits": waits,
    }


def pinned_apart(pairs: Sequence[work.Pair], layout: Layout, device: torch.device) -> Batch:
    batch = collate([comparison(pair) for pair in pairs], layout)
    return batch._map(lambda tensor: tensor.pin_memory()) if on_gpu(device) else batch


def peak() -> float:
    """Floating-point operations a second of this GPU in bfloat16, as its maker says; infinite: not known here."""
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in PEAKS.items() if known in name), math.inf)
