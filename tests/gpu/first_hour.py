#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What to find out first on a GPU that is there for an hour: whether all is right, then how fast it is, and why.

python tests/gpu/first_hour.py --results results.jsonl            all parts, in their order
python tests/gpu/first_hour.py right step --results results.jsonl some of them
python tests/gpu/first_hour.py --device cpu --small …             a rehearsal, in seconds a part
python tests/gpu/first_hour.py --show --results results.jsonl     what was found so far

- right: each way to share prompts against separate rows: hidden states, leaks, gradients; by dtype and head size, with
  recomputation too. Stop and mend if one is not.
- run: main.py on the quick start's data, from start to the verified model.
- step: a 1B shape at the lengths of HH-RLHF, 16 and 64 pairs a pass, by each way.
- mends: the same step with one thing otherwise: what each of them is worth.
- profile: where the time of a step goes, by kernel, and the calls that launch, copy and wait.
- kernels: the attention alone, forward and with its backward pass.
- larger: eight layers of an 8B shape: plain, with recomputed activations, with LoRA.
- plan: what ``reward-model plan`` would have said of the steps so far, beside what they held.
- peers: throughput.py beside TRL.

Every result is a line of JSON in the file, written as soon as it is there. What has a result is not measured again
without --again; what ended in an error is. A part begins nothing new after --minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP), str(TOP / "tests" / "helpers"), str(TOP / "tests" / "benchmarks")]

Case = tuple[str, Callable[[], dict]]  # its name, and what measures it


@dataclass(frozen=True)
class Options:
    results: Path
    device: str
    small: bool
    again: bool
    minutes: float

    @property
    def shape(self) -> str:
        return "small" if self.small else "1B"

    @property
    def pairs(self) -> tuple[int, ...]:
        return (2, 4) if self.small else (16, 64)


def right(options: Options) -> Iterator[Case]:
    import steps

    dims = (16,) if options.small else (64, 128, 80, 256)
    for dtype in ("bf16", "fp32"):
        for dim in dims:
            for way in [way for way in steps.WAYS if way != "separate"]:
                if (way, dtype, options.device) == ("varlen", "fp32", "cuda"):
                    continue  # FlashAttention's kernels are in half precision
                for recomputed in (False, True):
                    name = f"{way}, {dtype}, head {dim}{', recomputed' if recomputed else ''}"
                    yield name, lambda given=(way, dtype, dim, recomputed): parity(options, *given)


def parity(options: Options, way: str, dtype: str, dim: int, recomputed: bool) -> dict:
    """A way against separate rows, as the check at the start of a run measures it, and in gradients of weights."""
    import numpy
    import steps
    import torch

    from reward_model.models import attention_choice
    from reward_model.models.forward import ForwardPass

    device, kind = torch.device(options.device), steps.DTYPES[dtype]
    scorer = steps.random_scorer(steps.Shape(2, 4 * dim, 4 * dim, 4, 2, 512).config(), kind, device)
    with torch.no_grad():
        for weight in scorer.parameters():  # as large as trained ones: 0.02 would hide mistakes
            weight.mul_(4 if weight.dim() > 1 else 1)
    if recomputed:
        scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward, backend = ForwardPass(scorer, scorer, kind, device, pad=0), steps.WAYS[way]
    texts = attention_choice.Texts(numpy.random.default_rng(0).integers(1, 512, size=60).tolist(), 0)
    with torch.no_grad():
        difference, leak = attention_choice.disagreement(forward, backend, texts)
        gradients = attention_choice.gradient_disagreement(forward, backend, texts)
        rounding = attention_choice.rounding_ratio(forward, backend, texts)
    apart = weights_apart(forward, backend, options)
    tolerance = attention_choice.TOLERANCES[kind]
    within = difference <= tolerance and gradients <= 2 * tolerance and apart <= 2 * tolerance
    within &= dtype == "fp32" or rounding <= attention_choice.FURTHER
    found = {"difference": difference, "leak": leak, "gradients": gradients, "weights": apart, "tolerance": tolerance}
    return found | {"rounding": rounding, "right": within and leak <= attention_choice.LEAK}


def weights_apart(forward, backend, options: Options) -> float:
    """How far the gradients of all weights are from those by separate rows, relative to their size, on longer texts."""
    import steps
    import torch

    from reward_model.models.attention import SEPARATE
    from reward_model.reward_model import pairwise_loss

    shape = steps.Shape(2, 64, 64, 4, 2, 512, limit=64 if options.small else 512)
    found = []
    for chosen in (SEPARATE, backend):
        forward.use(chosen)
        forward.module.train()
        forward.module.zero_grad()
        batch = steps.packed(steps.draw(shape, 4), forward.layout, forward.device).to(forward.device)
        scores = forward(batch, batch.tokens.ends)
        pairwise_loss(scores[batch.pairs.better], scores[batch.pairs.worse]).mean().backward()
        found.append(torch.cat([p.grad.flatten().double() for p in forward.module.parameters()]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def run(options: Options) -> Iterator[Case]:
    yield "main.py, ZeRO 1", lambda: whole_run("--zero_stage 1")
    if not options.small:
        yield "main.py, ZeRO 3, recomputed", lambda: whole_run("--zero_stage 3 --gradient_checkpointing")


def whole_run(flags: str) -> dict:
    """main.py on the demo's data, in a process of its own: what it said of its attention, and its losses."""
    import runs

    from reward_model.data.demo import write_data, write_model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder / "data")
        for name, rows in (("train", 96), ("eval", 50)):
            file = folder / "data" / f"{name}.jsonl"
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
        write_model(folder / "model", folder / "data")
        start = time.perf_counter()
        metrics = runs.train(
            folder, folder / "out", *flags.split(), launcher="python", environment={"TORCH_LOGS": "recompiles"}
        )
        said = [line for line in metrics.output.splitlines() if "prompts are" in line]
        return {
            "seconds": time.perf_counter() - start,
            "attention": said[0] if said else None,
            "first_loss": metrics.losses[0],
            "last_loss": metrics.losses[-1],
            "held_out_accuracy": metrics.final["accuracy"],
            "recompilations": metrics.output.count("Recompiling function"),
        }


def step(options: Options) -> Iterator[Case]:
    import steps

    for pairs in options.pairs:
        for way in steps.WAYS:
            yield f"{pairs} pairs, {way}", lambda pairs=pairs, way=way: measured(options, options.shape, pairs, way)


def measured(options: Options, shape: str, pairs: int, way: str, flags: str = "", **more) -> dict:
    """What steps.measure finds, and what the plan has to know of it."""
    import steps

    timed = 2 if options.small else steps.TIMED
    flags = f"--zero_stage 1 {flags}".strip()
    found = steps.measure(steps.SHAPES[shape], pairs, way, flags, timed=timed, **more)
    return {"shape": shape, "pairs": pairs, "way": way, "flags": flags} | found


def fastest(options: Options) -> str:
    """The way that took the least time so far; before any was measured, the first that a GPU tries."""
    import steps

    known = [line for line in read(options.results) if line["part"] == "step" and "error" not in line]
    best = min(known, key=lambda line: line["seconds_a_step"] / line["pairs"], default={"way": next(iter(steps.WAYS))})
    return best["way"]


def mends(options: Options) -> Iterator[Case]:
    way, pairs = fastest(options), options.pairs[0]

    def timer(config: dict) -> None:
        config["timers"] = {"throughput": {"enabled": True}}

    def unchecked(config: dict) -> None:
        if "bf16" in config:
            config["bf16"]["check_grad_overflow"] = False

    def overlapped(config: dict) -> None:
        config["zero_optimization"]["overlap_comm"] = True

    changes: dict[str, dict] = {
        "as it is": {},
        "with the throughput timer": {"change": timer},
        "a batch in many copies": {"unpack": True},
        "without the check for overflow": {"change": unchecked},
        "with overlap_comm": {"change": overlapped},
        "recomputed": {"flags": "--gradient_checkpointing"},
    }
    for name, more in changes.items():
        yield f"{name}, {way}", lambda more=more: measured(options, options.shape, pairs, way, **more)


def profile(options: Options) -> Iterator[Case]:
    way, pairs = fastest(options), options.pairs[0]
    yield f"{pairs} pairs, {way}", lambda: profiled(options, pairs, way)


def profiled(options: Options, pairs: int, way: str) -> dict:
    """Three steps: the kernels that took longest, calls of CUDA, and the share of time that the GPU computed."""
    import steps
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = options.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    shape, flags = steps.SHAPES[options.shape], f"--zero_stage 1 --per_device_train_batch_size {pairs}"
    taken = steps.Steps(shape, flags, steps.WAYS[way])
    batch = steps.packed(steps.draw(shape, pairs), taken.trainer.forward.layout, taken.context.device)
    for _ in range(3):
        taken.step(batch)
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(3):
            taken.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    taken.close()
    profiler.export_chrome_trace(str(options.results.with_suffix(".trace.json.gz")))
    events = profiler.key_averages()
    # an operation has the time of its kernels, and these are there too
    computed = [event for event in events if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    longest = sorted(computed, key=lambda event: getattr(event, spent), reverse=True)[:15]
    calls = (
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
    )
    return {
        "seconds_a_step": seconds / 3,
        "device_share": sum(getattr(event, spent) for event in computed) / 1e6 / seconds,
        "longest": {event.key[:80]: round(getattr(event, spent) / 3e3, 3) for event in longest},  # ms a step
        "calls_a_step": {event.key: event.count / 3 for event in events if event.key in calls},
    }


def kernels(options: Options) -> Iterator[Case]:
    import steps

    rows = (256,) if options.small else (4096, 16_384)
    for tokens in rows:
        for dim in (16,) if options.small else (64, 128):
            for way in [*steps.WAYS, "causal"]:
                for any_length in (False, True) if way == "flex" else (False,):
                    if way != "separate":
                        name = f"{way}{', any length' if any_length else ''}, {tokens} tokens, head {dim}"
                        given = (way, tokens, dim, any_length)
                        yield name, lambda given=given: attention_alone(options, *given)


def attention_alone(options: Options, way: str, tokens: int, dim: int, any_length: bool) -> dict:
    """Milliseconds of one layer's attention over about so many tokens. causal: one text, the fastest there could be.

    any_length: what is compiled is for rows of any length, as it is from a run's second length on.
    """
    import steps
    import torch
    import torch._dynamo

    torch._dynamo.reset()
    fixed = not any_length
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=fixed):
        return times_of_attention(options, steps.WAYS.get(way), tokens, dim)


def times_of_attention(options: Options, backend, tokens: int, dim: int) -> dict:
    import steps
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from reward_model.models import attention

    device, dtype = torch.device(options.device), torch.bfloat16
    is_causal = backend is None
    backend = backend or attention.SEPARATE
    layout = steps.Layout(backend.layout, 0, block=backend.block)
    batch = steps.packed(filling(tokens, options.small), layout, device).to(device)
    shape = batch.tokens.input_ids.shape if not is_causal else (1, tokens)
    heads = (4, 2, 2) if options.small else (32, 8, 8)
    states = [torch.randn(*shape, n, dim, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for n in heads]
    mask = attention.attention_mask(batch, backend, dtype) if not is_causal else None
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads[0] // heads[1], True
    function = ALL_ATTENTION_FUNCTIONS[backend.attention or "sdpa"]

    def forward(_=0):
        return function(layer, *states, mask, scaling=dim**-0.5)[0]

    def both(_=0):
        forward().sum().backward()

    times = 3 if options.small else 20
    for _ in range(3):
        both()
    once, twice = (sorted(steps.seconds_of(do, times, device))[times // 2] for do in (forward, both))
    return {"tokens": math.prod(shape), "milliseconds": 1e3 * once, "with_backward": 1e3 * twice}


def filling(tokens: int, small: bool) -> list:
    """Pairs that fill about so many tokens, prompts counted once."""
    import steps
    import work

    shape = steps.SHAPES["small" if small else "1B"]
    pairs = steps.draw(shape, max(1, tokens // 20))
    count = next(n for n in range(1, len(pairs) + 1) if n == len(pairs) or work.tokens_once(pairs[: n + 1]) > tokens)
    return pairs[:count]


def larger(options: Options) -> Iterator[Case]:
    way, pairs = fastest(options), options.pairs[0]
    shape = "small" if options.small else "8B, 8 layers"
    for name, flags in (("plain", ""), ("recomputed", "--gradient_checkpointing"), ("LoRA", "--lora_dim 16")):
        yield f"{name}, {way}", lambda flags=flags: measured(options, shape, pairs, way, flags)


def plan(options: Options) -> Iterator[Case]:
    for line in read(options.results):
        if line["part"] in ("step", "larger") and "error" not in line:
            yield f"{line['part']}: {line['case']}", lambda line=line: planned(line)


def planned(line: dict) -> dict:
    """Bytes that the plan counts for a step that was measured, and those that it held at most."""
    import steps

    from reward_model.config.options import parse
    from reward_model.planning.activations import build_on_meta, passes
    from reward_model.planning.model_states import SETTINGS, Cluster, model_states
    from reward_model.planning.plan import Plan

    config = parse(["--model_name_or_path", "random", "--dtype", "bf16", *line["flags"].split()])
    made = Plan(build_on_meta(steps.SHAPES[line["shape"]].config(), config.model, "bf16"), config)
    if config.model.gradient_checkpointing:
        made.scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    setting = next(setting for setting in SETTINGS if setting.name == "1")
    states = model_states(made.counts, setting, Cluster(1, 1), 2, made.zero(setting, 1))
    counted = states.peak(passes(made.scorer, 1, line["computed_tokens_of_a_step"])[1])
    held = line["bytes_held"]
    return {"planned": counted, "held": held, "off": counted / held - 1 if held else None}


def peers(options: Options) -> Iterator[Case]:
    if importlib.util.find_spec("trl"):
        yield "throughput.py, TRL", lambda: beside_trl(options)
    else:
        print("without TRL: it cannot be imported")


def beside_trl(options: Options) -> dict:
    """throughput.py with and without grouping by length, on this device."""
    small = "--layers 1 --hidden 64 --intermediate 64 --heads 2 --vocabulary 256 --pairs 24 --batch 4 --limit 64"
    large = "--layers 16 --hidden 2048 --intermediate 8192 --heads 32 --vocabulary 32000 --pairs 1000 --batch 16"
    import runs

    with tempfile.TemporaryDirectory() as place:
        words = [
            sys.executable,
            str(TOP / "tests" / "benchmarks" / "throughput.py"),
            "--output",
            place,
            "--rounds",
            "1",
        ]
        words += ["--contenders", "ours", "trl", "trl_grouped", *(small if options.small else large).split()]
        done = subprocess.run(words, capture_output=True, text=True, env=runs.environment(PYTHONPATH=str(TOP)))
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])
        summary = json.loads(Path(place, "throughput.json").read_text())["summary"]
    kept = ("pairs_per_second", "tokens_per_second", "memory")
    return {name: {key: row[key] for key in kept} for name, row in summary.items()}


PARTS = {part.__name__: part for part in (right, run, step, mends, profile, kernels, larger, plan, peers)}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def do(part: str, options: Options) -> int:
    """Measure what has no result yet; the number of errors."""
    found = [line for line in read(options.results) if line["part"] == part and "error" not in line]
    done = set() if options.again else {line["case"] for line in found}
    errors, end = 0, time.monotonic() + 60 * options.minutes
    for name, measure in PARTS[part](options):
        if name in done:
            continue
        if time.monotonic() > end:
            print(f"{part}: {options.minutes:g} minutes are over; begun again, it goes on with {name}")
            break
        start = time.perf_counter()
        try:
            result = measure()
        except Exception as error:  # out of memory, say: the next may go on
            result, errors = {"error": f"{type(error).__name__}: {error}"[:500]}, errors + 1
        line = {"part": part, "case": name} | result | {"took": round(time.perf_counter() - start, 2)} | where(options)
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(shown(line), flush=True)
    return errors


def where(options: Options) -> dict:
    import torch

    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "small": options.small}


def shown(line: dict) -> str:
    """A result in a line of text."""
    left_out = ("part", "case", "device", "torch", "small", "shape", "pairs", "way", "flags")
    values = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in line.items() if name not in left_out}
    return f"{line['part']}: {line['case']}: " + ", ".join(f"{name} {value}" for name, value in values.items())


def prepare(options: Options) -> None:
    """Settings that have to come before the imports of torch and DeepSpeed."""
    if options.device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from reward_model.common.distributed import prepare_environment

    prepare_environment()
    if options.device == "cpu":
        import flex_on_cpu

        flex_on_cpu.allow()  # or there would be no gradients to rehearse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="[all of them]")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="lines of JSON, added to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, a rehearsal")
    parser.add_argument("--again", action="store_true", help="measure what has a result too")
    parser.add_argument("--minutes", type=float, default=9, help="a part begins nothing new after so many")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    given = vars(parser.parse_args())
    parts, show = given.pop("parts") or list(PARTS), given.pop("show")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    options = Options(**given)
    if show:
        print(*[shown(line) for line in read(options.results) if line["part"] in parts], sep="\n")
        return 0
    if options.device == "cpu" and not shutil.which("g++"):
        parser.error("--device cpu: DeepSpeed compiles its communication with g++")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    prepare(options)
    errors = sum(do(part, options) for part in parts)
    wrong = [line for line in read(options.results) if line.get("right") is False]
    for line in wrong:
        print(f"not right: {line['case']}")
    return int(bool(errors or wrong))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # DeepSpeed's threads would keep a process that has failed
