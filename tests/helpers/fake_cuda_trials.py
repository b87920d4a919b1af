# SPDX-License-Identifier: Apache-2.0
"""Trials on fake CUDA tensors, in a process of its own: prints a line of JSON for each, its name and what it raised.

python fake_cuda_trials.py [GROUP …]     controls, objectives, kernels
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fake_cuda

if __name__ == "__main__":
    fake_cuda.install()

import torch
import transformers
from aot_eager import install as trace_only
from flags import loss_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification

from reward_model.batching.batch import PackedBatch
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import first_line
from reward_model.config.objectives import LIST_LOSSES, PAIR_LOSSES, POINT_LOSSES
from reward_model.data.comparisons import Comparison
from reward_model.data.rows import judge_answer, judge_list, judge_pair
from reward_model.models.attention import DENSE, ON_CUDA, SEPARATE, AttentionBackend
from reward_model.models.forward import ForwardPass
from reward_model.models.scorer import Scorer, multiply_in_float32
from reward_model.objectives.losses import Thresholds
from reward_model.objectives.objective import Objective
from reward_model.reward_model import SCORE_PENALTIES
from reward_model.training.skipping import marked
from reward_model.training.step_log import StepLog
from reward_model.training.trainer import Trainer

CUDA = torch.device("cuda", 0)
DTYPE = torch.bfloat16

# what is done to a tensor (8, 4) on the GPU; the test says what of it raises
CONTROLS = {
    "item": lambda x: x.sum().item(),
    "if tensor": lambda x: 1 if (x > 0).any() else 0,
    "float": lambda x: float(x.detach().max()),
    "tolist": lambda x: x.tolist(),
    "boolean indexing": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: torch.unique(x),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.int64, device=CUDA), 0),
    "a CPU tensor added": lambda x: x + torch.zeros(4),
    "a CPU tensor compared": lambda x: torch.arange(4) < x,
    "where with a CPU condition": lambda x: torch.where(torch.ones(8, 4, dtype=torch.bool), x, 0.0),
    "index_select by a CPU tensor": lambda x: x.index_select(0, torch.tensor([0, 1])),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "index by a CPU tensor": lambda x: x[torch.tensor([0, 1])],
    "cpu": lambda x: x.cpu(),
    "a tensor made of a list": lambda x: torch.tensor([1, 2], device=CUDA),
    "a CPU number": lambda x: x * torch.tensor(2.0),
}

IN_PLACE = "an objective that looks at its loss"

OWN_FLAGS = {"scaled": "--margin large", "prior_cosine": "--prior_model none", "logistic": "--label_smoothing column"}
FLAGS = [f"--loss {name} {OWN_FLAGS.get(name, '')}".strip() for name in (*PAIR_LOSSES, *LIST_LOSSES, *POINT_LOSSES)]
FLAGS += [f"--loss logistic mse --length_penalty 1 --score_penalty {kind}" for kind in SCORE_PENALTIES]
FLAGS += [f"--loss {name} --loss_level token" for name in ("logistic", "focal")]
FLAGS += ["--margin similarity --pair_weight norm", "--contrastive_weight 1"]
FLAGS += ["--contrastive_weight 1 --contrastive difference"]

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIGS = {
    "llama": ("LlamaConfig", SIZES | {"num_key_value_heads": 1, "intermediate_size": 32}),
    "qwen3": ("Qwen3Config", SIZES | {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 16}),
    "gpt2": ("GPT2Config", SIZES | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


def rows() -> list[Comparison]:
    """A pair, a ranked list of three, and a labeled answer, with all that an objective may want to know."""
    pair = judge_pair({"rating": 2, "probability": 0.75, "chosen_score": 1, "rejected_score": 0})
    ranked = judge_list(3, [1.0, 0.0, 2.0]) | {"rating": [2.0] * 3, "probability": [0.75] * 3}
    return [
        Comparison([1], [[2, 8], [3, 9, 8]], similarity=[0.5], **pair),
        Comparison([4], [[5], [6], [7, 8]], similarity=[0.1, 0.2, 0.3], **ranked),
        Comparison([4], [[9, 9]], **judge_answer({"label": 1})),
    ]


def packed(backend: AttentionBackend) -> PackedBatch:
    """A batch as another process hands it to the trainer."""
    return collate(rows(), Layout(backend.layout, 0, block=backend.block), row_weights=[1, 1, 1]).packed()


def control(name: str) -> None:
    with FakeTensorMode():
        CONTROLS[name](torch.empty(8, 4, device=CUDA, requires_grad=True))


class Curious(Objective):
    """A fault as one might be written: it looks at a loss."""

    def __call__(self, *arguments, **options):
        loss = super().__call__(*arguments, **options)
        return loss if loss > 0 else loss.clamp(min=0)


def micro_batch(family: str, backend: AttentionBackend, flags: str, kind: type[Objective] = Objective) -> None:
    """What the trainer does with a batch, without the engine: scores, loss, gradients, and the sums of the step."""
    loss_options = loss_of(flags)
    objective = kind(loss_options)
    name, sizes = CONFIGS[family]
    config = getattr(transformers, name)(**sizes, num_labels=1, pad_token_id=0)
    given = packed(backend)
    with FakeTensorMode() as mode:
        with CUDA:
            model = AutoModelForSequenceClassification.from_config(config, dtype=DTYPE)
            multiply_in_float32(model)
            scorer = Scorer(model, "last").train()
            scorer.keeps_states = loss_options.reads_states
            if objective.distance:
                objective.distance.mean = torch.ones((), dtype=torch.float64)
            if "ordinal" in flags:
                scorer.thresholds = Thresholds(torch.tensor([-0.5, 0.5]), DTYPE)
        forward = ForwardPass(scorer, scorer, DTYPE, CUDA, pad=0)
        forward.use(backend)
        batch = replace(given, buffer=mode.from_tensor(given.buffer)).to(CUDA)  # one buffer, cut there
        trainer = SimpleNamespace(settings=SimpleNamespace(loss=loss_options), forward=forward, objective=objective)
        trainer.with_second_view = partial(Trainer.with_second_view, trainer)
        loss, chosen, rejected = Trainer.loss(trainer, batch)
        (marked(loss) * batch.weight).backward()
        for parameter in scorer.parameters():
            assert parameter.grad is not None and parameter.grad.device == CUDA, "a weight without a gradient"
        log = StepLog(DistributedContext(0, 1, CUDA), records=None, bar=None, health=None)
        log.add(loss.detach(), chosen.detach(), rejected.detach(), batch)
        if "points" in objective.kinds.values():
            objective.right_labels(batch, torch.zeros(6, device=CUDA), forward.thresholds)
        assert loss.device == chosen.device == log.sums.device == CUDA
        assert loss.dtype == torch.float32 and loss.dim() == 0


def trials(groups: list[str]):
    """Name → what to try."""
    if "controls" in groups:
        yield from ((f"controls {name}", lambda name=name: control(name)) for name in CONTROLS)
        yield f"controls {IN_PLACE}", lambda: micro_batch("llama", SEPARATE, FLAGS[0], Curious)
    if "objectives" in groups:
        for backend in (SEPARATE, DENSE):
            for flags in FLAGS:
                yield f"objectives {backend.name} {flags}", lambda b=backend, f=flags: micro_batch("llama", b, f)
    if "kernels" in groups:
        trace_only()
        for family in CONFIGS:
            for backend in ON_CUDA[:2]:
                yield f"{backend.name} {family}", lambda f=family, b=backend: micro_batch(f, b, FLAGS[0])


def main() -> None:
    for name, trial in trials(sys.argv[1:] or ["controls", "objectives", "kernels"]):
        raised = None
        try:
            trial()
        except Exception as error:  # whatever it is, the test shows it
            raised = f"{type(error).__name__}: {first_line(error)}"
        print(json.dumps({"trial": name, "raised": raised}), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
