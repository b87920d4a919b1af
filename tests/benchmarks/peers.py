# SPDX-License-Identifier: Apache-2.0
"""One contender, one pass over the work, in this process: prints a line of JSON at the end.

python peers.py trl FOLDER --batch 8 --limit 512 --dtype fp32
python peers.py ours FOLDER --flags "--zero_stage 1"
python peers.py openrlhf FOLDER --openrlhf CHECKOUT
DEEPSPEED_EXAMPLES=CHECKOUT python peers.py upstream FOLDER

All train the same pairs from the same weights with AdamW. Each in its own way: batches, padding, loss, order. OpenRLHF
and upstream run in a plain loop here, without their engines; OpenRLHF without its packing, which needs flash-attn.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from work import PAD, SEED, read_pairs

TOP = Path(__file__).resolve().parent.parent.parent
UPSTREAM_FILE = "applications/DeepSpeed-Chat/dschat/utils/model/reward_model.py"
WARMUP = 2  # steps that are not timed: allocations, the optimizer's state, compiled kernels
LEARNING_RATE, BETAS, MAX_NORM = 1e-5, (0.9, 0.95), 1.0


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Clock:
    """Time and CPU time from the end of the second step to the end of the last, and what each step computed."""

    def __init__(self, steps: int):
        self.steps = steps
        self.times: list[tuple[float, float]] = []
        self.pairs, self.tokens = [0], [0]  # a number a step; the last is of the step that runs
        self.losses: list[torch.Tensor | float] = []
        self.memory_before = peak_memory()

    def batch(self, pairs: int, tokens: int) -> None:
        """Count a batch of the step: its pairs, and the tokens that go through the model, pads included."""
        self.pairs[-1] += pairs
        self.tokens[-1] += tokens

    def end_step(self) -> None:
        if len(self.tokens) in (WARMUP, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append((time.perf_counter(), time.process_time()))
        self.pairs.append(0)
        self.tokens.append(0)

    def result(self, library: str) -> dict:
        """What is printed: seconds of the timed steps, bytes, and tokens step by step."""
        assert len(self.tokens) == self.steps + 1, f"{len(self.tokens) - 1} steps of {self.steps}"
        (wall, cpu), (wall_end, cpu_end) = self.times
        return {
            "library": library,
            "torch": torch.__version__,
            "pairs": sum(self.pairs),
            "steps": self.steps,
            "warmup_steps": WARMUP,
            "timed_pairs": sum(self.pairs[WARMUP:]),
            "wall_seconds": wall_end - wall,
            "cpu_seconds": cpu_end - cpu,
            "tokens": self.tokens[:-1],
            "memory_before": self.memory_before,
            "memory": peak_memory(),
            "cuda_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "first_loss": float(self.losses[0]),
            "last_loss": float(self.losses[-1]),
        }


def ours(options: argparse.Namespace) -> dict:
    """``training_scripts/main.py`` as it is, DeepSpeed's engine included."""
    sys.path.insert(0, str(TOP))
    from reward_model.common.distributed import prepare_environment
    from reward_model.common.logging import quieten

    prepare_environment()  # before what it is for is imported: main.py would come too late
    quieten(debug=False)
    from importlib.metadata import version

    import reward_model
    from reward_model.training import engine
    from reward_model.training.records import Records
    from reward_model.training.step_log import StepLog

    clocks: list[Clock] = []
    watch(StepLog, Records, clocks)
    flags = {
        "--model_name_or_path": options.folder / "model",
        "--data_path": options.folder / "data",
        "--data_output_path": options.folder / "cache",
        "--max_seq_len": options.limit,
        "--per_device_train_batch_size": options.batch,
        "--learning_rate": LEARNING_RATE,
        "--max_grad_norm": MAX_NORM,
        "--dtype": options.dtype,
    }
    sys.argv = ["main.py", *[str(word) for flag in flags.items() for word in flag], *shlex.split(options.flags)]
    try:
        runpy.run_path(str(TOP / "training_scripts" / "main.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    assert engine.BETAS == BETAS
    return clocks[0].result(f"reward_model {reward_model.__version__}, DeepSpeed {version('deepspeed')}")


def watch(log: type, records: type, clocks: list[Clock]) -> None:
    """Have the trainer's log of steps keep a clock too, which begins with it and lands in ``clocks``."""
    start, add, end, record = log.__init__, log.add, log.end_step, records.add

    def start_clock(self, context, records, bar, health):
        start(self, context, records, bar, health)
        clocks.append(Clock(bar.total))

    def add_batch(self, loss, chosen, rejected, batch):
        add(self, loss, chosen, rejected, batch)
        clocks[0].batch(len(chosen), batch.tokens.input_ids.numel())

    def end_step(self, *step):
        end(self, *step)
        clocks[0].end_step()

    def note_loss(self, values):
        record(self, values)
        if values["split"] == "train":
            clocks[0].losses.append(values["loss"])

    log.__init__, log.add, log.end_step, records.add = start_clock, add_batch, end_step, note_loss


def train_with_trl(options: argparse.Namespace, **settings) -> dict:
    """TRL's trainer on texts that are tokenized already; rows of a batch padded to the longest of it."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    columns = zip(*[pair.texts for pair in read_pairs(options.folder)])
    data = Dataset.from_dict(dict(zip(("chosen_ids", "rejected_ids"), columns)))
    data = data.map(lambda row: {"length": max(len(row["chosen_ids"]), len(row["rejected_ids"]))})
    clock = Clock(-(-len(data) // options.batch))

    class Watched(trl.RewardTrainer):
        def training_step(self, model, inputs, *rest):
            clock.batch(len(inputs["input_ids"]) // 2, inputs["input_ids"].numel())
            loss = super().training_step(model, inputs, *rest)
            clock.losses.append(loss)
            return loss

    class EndOfStep(TrainerCallback):
        def on_train_begin(self, *arguments, **more):
            clock.memory_before = peak_memory()

        def on_step_end(self, *arguments, **more):
            clock.end_step()

    with tempfile.TemporaryDirectory() as output:
        config = trl.RewardConfig(
            output_dir=output,
            per_device_train_batch_size=options.batch,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=MAX_NORM,
            max_length=options.limit,
            bf16=options.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            seed=SEED,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = Watched(model=str(options.folder / "model"), args=config, train_dataset=data, callbacks=[EndOfStep()])
        trainer.train()
    return clock.result(f"TRL {trl.__version__}")


def trl_given_order(options: argparse.Namespace) -> dict:
    """TRL without recomputing activations, pairs in the order of the file."""
    return train_with_trl(options, gradient_checkpointing=False, train_sampling_strategy="sequential")


def trl_default(options: argparse.Namespace) -> dict:
    """TRL as it comes: activations recomputed, random order."""
    return train_with_trl(options)


def trl_grouped(options: argparse.Namespace) -> dict:
    """TRL without recomputing activations, pairs of similar length together."""
    # unused columns would go, and with them the lengths to sort by
    grouping = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    return train_with_trl(options, gradient_checkpointing=False, **grouping)


def openrlhf(options: argparse.Namespace) -> dict:
    """OpenRLHF's data set, collation, model and loss: rows padded on the left to the longest of the batch."""
    # modules of its own that need flash-attn and pylatexenc when imported, and hold nothing that is used here
    for name in ("openrlhf.models.ring_attn_utils", "openrlhf.utils.math_utils"):
        sys.modules[name] = Hollow(name)
    sys.path.insert(0, str(options.openrlhf))
    from datasets import Dataset
    from openrlhf.datasets.reward_dataset import RewardDataset
    from openrlhf.models import PairWiseLoss, get_llm_for_sequence_regression
    from openrlhf.trainer.rm_trainer import RewardModelTrainer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    names = SimpleNamespace(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")
    strategy = SimpleNamespace(args=SimpleNamespace(data=names), ring_attn_group=None)
    rows = Dataset.from_json(str(options.folder / "data" / "train.jsonl"))
    data = RewardDataset(rows, tokenizer, options.limit, strategy, num_processors=None)
    model = get_llm_for_sequence_regression(
        str(options.folder / "model"), "reward", attn_implementation="sdpa", init_value_head=True
    ).float()  # it loads in bf16 or fp16 only
    trainer, loss_of = SimpleNamespace(tokenizer=tokenizer, strategy=strategy), PairWiseLoss()

    def loss(batch):
        chosen, chosen_mask, rejected, rejected_mask = (part.squeeze(1) for part in batch[:4])
        ids, mask = RewardModelTrainer.concatenated_inputs(trainer, chosen, chosen_mask, rejected, rejected_mask)
        scores, _ = model(ids.to(model.device), attention_mask=mask.to(model.device), return_output=True)
        return loss_of(*scores.float().chunk(2)), ids

    version = (options.openrlhf / "version.txt").read_text().strip()
    return train(model, data, data.collate_fn, loss, options).result(f"OpenRLHF {version}")


class Hollow(ModuleType):
    """A module that has every name, and nothing behind it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)


def upstream(options: argparse.Namespace) -> dict:
    """DeepSpeed-Chat's ``reward_model.py``: its forward and loss, every row padded to the limit."""
    from transformers import AutoModel, AutoTokenizer

    checkout = os.environ["DEEPSPEED_EXAMPLES"]
    spec = importlib.util.spec_from_file_location("upstream_reward_model", Path(checkout) / UPSTREAM_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backbone = AutoModel.from_pretrained(options.folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    model = module.RewardModel(backbone, tokenizer, compute_fp32_loss=options.dtype != "fp32")
    texts = [pair.texts for pair in read_pairs(options.folder)]
    padded = torch.tensor([[ids + [PAD] * (options.limit - len(ids)) for ids in pair] for pair in texts])  # (n, 2, s)

    def loss(ids):
        ids = ids.to(next(model.parameters()).device)
        return model(ids, attention_mask=(ids != PAD).long())["loss"], ids

    def collate(pairs):
        return torch.stack(pairs, dim=1).flatten(0, 1)  # b chosen rows, then the b rejected

    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    version = f"DeepSpeedExamples {commit.stdout.strip()}"
    return train(model, padded, collate, loss, options).result(version)


def train(model: torch.nn.Module, data: Iterable, collate, loss_of, options: argparse.Namespace) -> Clock:
    """One pass in random order; ``loss_of`` a batch: its loss, and the ids (2b, s) that it computed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(SEED)
    loader = torch.utils.data.DataLoader(data, options.batch, shuffle=True, collate_fn=collate, generator=order)
    clock = Clock(len(loader))
    for batch in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            loss, ids = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.detach())
        clock.batch(len(ids) // 2, ids.numel())
        clock.end_step()
    return clock


CONTENDERS = {
    "ours": ours,
    "upstream": upstream,
    "openrlhf": openrlhf,
    "trl_default": trl_default,
    "trl": trl_given_order,
    "trl_grouped": trl_grouped,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("folder", type=Path, help="of the work: model/ and data/")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--limit", type=int, default=512, help="longest text, in tokens")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--flags", default="", help="more flags of main.py, for ours")
    parser.add_argument("--openrlhf", type=Path, help="a checkout of OpenRLHF")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # libraries print too
        result = CONTENDERS[options.contender](options)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
