# SPDX-License-Identifier: Apache-2.0
"""``reward-model plan``: memory and communication of a run, and the line that launches it.

reward-model plan --model_name_or_path meta-llama/Llama-2-7b-hf --gpus 8 --gpu_memory 80
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch

from reward_model.common.errors import UserError
from reward_model.config import options as flags
from reward_model.models.loading import read_config
from reward_model.planning.activations import build_on_meta
from reward_model.planning.model_states import (
    Cluster,
    Setting,
    deepspeed_estimate,
)
from reward_model.planning.plan import CONTEXT, FRAGMENTS, GIB, Estimate, Plan

MOST_GPUS = 1024
SHARED_FLAGS = (  # with main.py
    "per_device_train_batch_size",
    "max_seq_len",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "lora_dim",
    "lora_module_name",
    "dtype",
    "pooling",
    "dropout",
)
NOTES = f"""\
GiB. GPU: the most at once, activations kept; ckpt: with --gradient_checkpointing. Model states and buckets as DeepSpeed
0.19 holds them, activations for answers of full length that share no prompt, and an allowance of
{CONTEXT // GIB} GiB (CUDA, NCCL) and {FRAGMENTS:.0%} (fragments). host: of a node, for offload or while it loads.
sent: by a GPU in a step. 3 + NVMe and ZeRO++ are by formula alone; the rest agrees with what runs on CPUs hold.
Fastest: without offload first, then without checkpointing, then what sends least; of equals the one that holds least.
"""


def plan_parser() -> flags.Parser:
    """``plan``'s own flags, and those of main.py that change what a run needs, as main.py has them."""
    parser = flags.Parser(
        prog="reward-model plan",
        description="Estimate memory and communication of a run for every ZeRO setting; prints the line to launch.",
        epilog="example: reward-model plan --model_name_or_path meta-llama/Llama-2-7b-hf --gpus 8 --gpu_memory 80",
        allow_abbrev=False,
        formatter_class=flags.Help,
    )
    parser.add_argument("--model_name_or_path", "--model", required=True, help="a folder or a hub name; its config")
    parser.add_argument("--gpus", type=flags.positive_int, help="in all [those of this machine, or 1]")
    parser.add_argument("--gpus_per_node", type=flags.positive_int, help="[8, or fewer if there are fewer]")
    parser.add_argument("--gpu_memory", type=flags.positive, help="GiB of each [of this machine's first GPU]")
    parser.add_argument("--host_memory", type=flags.positive, help="GiB of each node [not checked]")
    parser.add_argument("--verbose", action="store_true", help="show what each number is made of")
    theirs = {action.dest: action for action in flags.build_parser()._actions}
    for name in SHARED_FLAGS:
        parser._add_action(theirs[name])
    return parser


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The GPUs that the flags name, or else this machine's.

    Raises:
        UserError: no memory given and no GPU here; GPUs that do not fill nodes.
    """
    present = torch.cuda.device_count()
    gpus = options.gpus or present or 1
    per_node = min(gpus, options.gpus_per_node or 8)
    if gpus % per_node:
        raise UserError(f"--gpus {gpus} is not a multiple of --gpus_per_node {per_node}")
    if not options.gpu_memory and not present:
        raise UserError("no GPU here to plan for: give its memory in GiB, e.g. --gpu_memory 80")
    memory = options.gpu_memory or torch.cuda.get_device_properties(0).total_memory / GIB
    return Cluster(gpus, per_node, memory, options.host_memory or 0.0)


def launch_line(options: argparse.Namespace, estimate: Estimate, cluster: Cluster, pairs: int) -> str:
    """What starts the run; flags that were given go with it."""
    nodes = cluster.gpus // cluster.per_node
    data = "DATA=/path/of/your/data"
    start = f"HOSTFILE=hostfile {data} bash training_scripts/multi_node.sh"
    if nodes == 1:
        start = f"NUM_GPUS={cluster.gpus} {data} bash training_scripts/single_node.sh"
    if cluster.gpus == 1:
        start = f"{data} bash training_scripts/single_gpu.sh"
    words = ["--model_name_or_path", options.model_name_or_path, "--dtype", options.dtype]
    words += ["--per_device_train_batch_size", str(pairs), "--max_seq_len", str(options.max_seq_len)]
    for name in ("gradient_accumulation_steps", "lora_dim", "lora_module_name", "pooling", "dropout"):
        if name in options.explicit:
            words += [f"--{name}", str(getattr(options, name))]
    line = f"{start} {shlex.join(words)} {estimate.setting.flags}"
    return line + (" --gradient_checkpointing" if estimate.checkpointing else "") + " --output_dir output"


def gib(size: float) -> str:
    return "-" if not size else f"{size / GIB:,.1f}" if size < 999 * GIB else f"{size / GIB:,.0f}"


def table(plan: Plan, cluster: Cluster, pairs: int, verbose: bool) -> Iterator[str]:
    """A line for each setting."""
    estimates = plan.estimates(cluster, pairs)
    rows: dict[Setting, list[Estimate]] = {}
    for estimate in estimates:
        rows.setdefault(estimate.setting, []).append(estimate)
    columns = [f"{'GPU, ckpt' if e.checkpointing else 'GPU':>10}" for e in next(iter(rows.values()))]
    more = f"{'states':>9} {'buffers':>8} {'step':>8} {'DeepSpeed':>10}" if verbose else ""
    yield f"{'ZeRO':9}{''.join(columns)} {'host':>9} {'sent':>8} {more}   fits"
    for setting, pair in rows.items():
        states, fitting = pair[0].states, [e for e in pair if e.fits]
        said = "yes" if any(not e.checkpointing for e in fitting) else "with checkpointing" if fitting else "no"
        if not fitting and any(e.gpu <= cluster.gpu_memory * GIB for e in pair):
            said = "no: host memory"
        sizes = "".join(f"{gib(e.gpu):>10}" for e in pair)
        if verbose:
            estimate = deepspeed_estimate(plan.counts, setting, cluster) or 0
            held = states.resident + states.gradients
            more = f"{gib(held):>9} {gib(states.buffers):>8} {gib(states.step):>8} {gib(estimate):>10}"
        yield f"{setting.name:9}{sizes} {gib(pair[0].host):>9} {gib(pair[0].sent):>8} {more}   {said}"


def what_would(plan: Plan, cluster: Cluster, offload: bool) -> Iterator[str]:
    """What would fit, with offload or without: a smaller micro-batch of the same global batch, and more GPUs."""
    options = plan.options
    pairs = smaller = options.per_device_train_batch_size
    while smaller := smaller // 2:
        if best := plan.best(cluster, smaller, offload):
            steps = options.gradient_accumulation_steps * pairs // smaller
            size = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {steps}"
            yield f"  {size}: {described(best)}"
            break
    per_node = options.gpus_per_node or 8
    for gpus in [2**k for k in range(10) if 2**k < per_node] + list(range(per_node, MOST_GPUS + 1, per_node)):
        more = replace(cluster, gpus=gpus, per_node=min(gpus, per_node))
        if gpus > cluster.gpus and (best := plan.best(more, pairs, offload)):
            yield f"  --gpus {gpus}: {described(best)}"
            return
    yield f"  no number of GPUs up to {MOST_GPUS} with {pairs} pairs each"


def over_slow_links(plan: Plan, cluster: Cluster, best: Estimate) -> Iterator[str]:
    """ZeRO++ beside stage 3."""
    for other in plan.estimates(cluster, plan.options.per_device_train_batch_size):
        if other.setting.plus and other.fits and (best.setting.name, best.checkpointing) == ("3", other.checkpointing):
            yield "Over slow links between nodes, with weights that are sent in 8 bits:"
            sends = f"sends {gib(other.sent)} instead of {gib(best.sent)}"
            yield f"  {other.setting.flags}: {gib(other.gpu)} GiB a GPU, {sends}"


def described(estimate: Estimate) -> str:
    recomputing = " with checkpointing" if estimate.checkpointing else ""
    host = f", {gib(estimate.host)} of each host" if estimate.setting.offload != "none" else ""
    return f"ZeRO {estimate.setting.name}{recomputing}, {gib(estimate.gpu)} GiB a GPU{host}"


def show(options: argparse.Namespace) -> Generator[str, None, bool]:
    """The plan, line by line; whether anything fits."""
    cluster, pairs = cluster_of(options), options.per_device_train_batch_size
    plan = Plan(build_on_meta(read_config(options.model_name_or_path), options), options)
    counts = plan.counts
    yield (
        f"{options.model_name_or_path}: {counts.total / 1e9:,.2f} billion parameters, {counts.layers} layers of "
        f"{counts.hidden}, {'all' if counts.trained == counts.total else f'{counts.trained:,} of them'} trained, "
        f"{options.dtype}"
    )
    host = f", {cluster.host_memory:g} GiB of host memory" if cluster.host_memory else ""
    nodes = f", nodes of {cluster.per_node}" if cluster.gpus > 1 else ""
    yield (
        f"{cluster.gpus} × {cluster.gpu_memory:.4g} GiB{nodes}{host}; {pairs} pairs a GPU at a time: at most "
        f"{2 * pairs * options.max_seq_len:,} tokens"
    )
    yield ""
    yield from table(plan, cluster, pairs, options.verbose)
    yield ""
    yield NOTES
    best = plan.best(cluster, pairs)
    if not best:
        yield "Nothing fits. What would:"
        yield from what_would(plan, cluster, offload=True)
        return False
    yield from parts(plan, best, pairs)
    if best.setting.offload != "none":
        yield "Faster, because without offload:"
        yield from what_would(plan, cluster, offload=False)
    yield from over_slow_links(plan, cluster, best)
    yield f"\nAt the top of the checkout, with your data:\n{launch_line(options, best, cluster, pairs)}"
    return True


def parts(plan: Plan, best: Estimate, pairs: int) -> Iterator[str]:
    """The choice, and the numbers that make up its memory."""
    states, active = best.states, plan.activations(pairs, best.checkpointing)
    terms = {
        "parameters and optimizer": states.resident,
        "gradients": states.gradients,
        "buffers": states.buffers + max(0, states.bucket - active),  # of stage 0's, what activations leave no room for
        "activations": active,
    }
    backward = sum(terms.values())
    if states.step > backward:
        terms = {"parameters, optimizer and gradients while it steps": states.step}
    terms["allowance"] = best.gpu - max(backward, states.step)
    yield f"Fastest that fits: {described(best)}:"
    yield "  " + " + ".join(f"{name} {gib(size)}" for name, size in terms.items() if size)
    if best.setting.offload == "nvme":
        yield f"  and on the disks {gib(18 * plan.counts.trained)} in all"


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; the exit status is 1 if nothing fits."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = plan_parser()
    options = parser.parse_args(given)
    options.dtype = options.dtype or "bf16"
    words = {word.split("=")[0] for word in given}
    options.explicit = {action.dest for action in parser._actions if words.intersection(action.option_strings)}
    if options.lora_module_name and not options.lora_dim:
        raise UserError("--lora_module_name without --lora_dim: give the adapters' dimension")
    lines = show(options)
    while True:
        try:
            print(next(lines), flush=True)
        except StopIteration as end:
            return 0 if end.value else 1
