# SPDX-License-Identifier: Apache-2.0
"""The plan in words: a line for each setting, the choice, and the line that launches it."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch

from reward_model.common.errors import UserError
from reward_model.common.words import in_bytes
from reward_model.config.options import RunConfig
from reward_model.config.planning import PlanConfig
from reward_model.models.loading import read_config
from reward_model.planning.activations import build_on_meta
from reward_model.planning.model_states import (
    SETTINGS,
    Cluster,
    Counts,
    Setting,
    deepspeed_estimate,
)
from reward_model.planning.plan import CONTEXT, FRAGMENTS, GIB, Estimate, Plan

MOST_GPUS = 1024
IN_THE_LINE = (
    *("lora_dim", "lora_module_name", "lora_dropout", "lora_bits", "optim", "pooling", "dropout"),
    *("heads", "head_anchor"),
)
NOTES = f"""\
GiB. GPU: the most at once, activations kept; ckpt: with --gradient_checkpointing. Model states and buckets as DeepSpeed
0.19 holds them, activations for answers of full length that share no prompt, and an allowance of
{CONTEXT // GIB} GiB (CUDA, NCCL) and {FRAGMENTS:.0%} (fragments). host: of a node, for offload or while it loads.
sent: by a GPU in a step. 3 + NVMe and ZeRO++ are by formula alone; the rest agrees with what runs on CPUs hold.
Fastest: without offload first, then without checkpointing, then what sends least; of equals the one that holds least.
"""


def cluster_of(config: PlanConfig) -> Cluster:
    """The GPUs that the flags name, or else this machine's.

    Raises:
        UserError: no memory given and no GPU here; GPUs that do not fill nodes.
    """
    present = torch.cuda.device_count()
    gpus = config.gpus or present or 1
    per_node = min(gpus, config.gpus_per_node or 8)
    if gpus % per_node:
        raise UserError(f"--gpus {gpus} is not a multiple of --gpus_per_node {per_node}")
    if not config.gpu_memory and not present:
        raise UserError("no GPU here to plan for: give its memory in GiB, e.g. --gpu_memory 80")
    memory = config.gpu_memory or torch.cuda.get_device_properties(0).total_memory / GIB
    return Cluster(gpus, per_node, memory, config.host_memory or 0.0)


def launch_line(config: RunConfig, estimate: Estimate, cluster: Cluster, pairs: int) -> str:
    """What starts the run; flags that were given go with it."""
    nodes = cluster.gpus // cluster.per_node
    data = "DATA=/path/of/your/data"
    start = f"HOSTFILE=hostfile {data} bash training_scripts/multi_node.sh"
    if nodes == 1:
        start = f"NUM_GPUS={cluster.gpus} {data} bash training_scripts/single_node.sh"
    if cluster.gpus == 1:
        start = f"{data} bash training_scripts/single_gpu.sh"
    words = ["--model_name_or_path", config.model.model_name_or_path, "--dtype", config.engine.dtype]
    words += ["--per_device_train_batch_size", str(pairs), "--max_seq_len", str(config.data.max_seq_len)]
    for name in ("gradient_accumulation_steps", *IN_THE_LINE):
        if name in config.given:
            words += [f"--{name}", str(config.values()[name])]
    line = f"{start} {shlex.join(words)} {estimate.setting.flags}"
    if estimate.checkpointing:
        line += " --gradient_checkpointing" + (" --offload_activations" if config.model.offload_activations else "")
    return f"{line} --output_dir output"


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
            theirs = deepspeed_estimate(plan.counts, setting, cluster) or 0
            held = states.resident + states.gradients
            more = f"{gib(held):>9} {gib(states.buffers):>8} {gib(states.step):>8} {gib(theirs):>10}"
        yield f"{setting.name:9}{sizes} {gib(pair[0].host):>9} {gib(pair[0].sent):>8} {more}   {said}"


def what_would(plan: Plan, cluster: Cluster, per_node: int, offload: bool) -> Iterator[str]:
    """What would fit, with offload or without: a smaller micro-batch of the same global batch, and more GPUs."""
    batches = plan.config.batches
    pairs = smaller = batches.per_device_train_batch_size
    while smaller := smaller // 2:
        if best := plan.best(cluster, smaller, offload):
            steps = batches.gradient_accumulation_steps * pairs // smaller
            size = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {steps}"
            yield f"  {size}: {described(best)}"
            break
    for gpus in [2**k for k in range(10) if 2**k < per_node] + list(range(per_node, MOST_GPUS + 1, per_node)):
        more = replace(cluster, gpus=gpus, per_node=min(gpus, per_node))
        if gpus > cluster.gpus and (best := plan.best(more, pairs, offload)):
            yield f"  --gpus {gpus}: {described(best)}"
            return
    yield f"  no number of GPUs up to {MOST_GPUS} with {pairs} pairs each"


def over_slow_links(plan: Plan, cluster: Cluster, best: Estimate) -> Iterator[str]:
    """ZeRO++ beside stage 3."""
    for other in plan.estimates(cluster, plan.config.batches.per_device_train_batch_size):
        if other.setting.plus and other.fits and (best.setting.name, best.checkpointing) == ("3", other.checkpointing):
            yield "Over slow links between nodes, with weights that are sent in 8 bits:"
            sends = f"sends {gib(other.sent)} instead of {gib(best.sent)}"
            yield f"  {other.setting.flags}: {gib(other.gpu)} GiB a GPU, {sends}"


def described(estimate: Estimate) -> str:
    recomputing = " with checkpointing" if estimate.checkpointing else ""
    host = f", {gib(estimate.host)} of each host" if estimate.setting.offload != "none" else ""
    return f"ZeRO {estimate.setting.name}{recomputing}, {gib(estimate.gpu)} GiB a GPU{host}"


def show(asked: PlanConfig, config: RunConfig) -> Generator[str, None, bool]:
    """The plan, line by line; whether anything fits."""
    cluster, pairs = cluster_of(asked), config.batches.per_device_train_batch_size
    name, dtype, per_node = config.model.model_name_or_path, config.engine.dtype, asked.gpus_per_node or 8
    anchored = config.loss.head_anchor > 0
    found = read_config(name, config.model.trust_remote_code)
    plan = Plan(build_on_meta(found, config.model, dtype, anchored), config)
    counts, bits = plan.counts, config.model.lora_bits
    in_bits = f", and {counts.quantized / counts.total:.0%} of the parameters in {bits} bits" if bits else ""
    yield (
        f"{name}: {counts.total / 1e9:,.2f} billion parameters, {counts.layers} layers of "
        f"{counts.hidden}, {'all' if counts.trained == counts.total else f'{counts.trained:,} of them'} trained, "
        f"{dtype}{in_bits}"
    )
    yield from of_heads(counts, config.model.heads, plan.width)
    host = f", {cluster.host_memory:g} GiB of host memory" if cluster.host_memory else ""
    nodes = f", nodes of {cluster.per_node}" if cluster.gpus > 1 else ""
    yield (
        f"{cluster.gpus} × {cluster.gpu_memory:.4g} GiB{nodes}{host}; {pairs} pairs a GPU at a time: at most "
        f"{2 * pairs * config.data.max_seq_len:,} tokens"
    )
    yield ""
    yield from table(plan, cluster, pairs, asked.verbose)
    yield ""
    yield NOTES
    if left_out := [setting.name for setting in SETTINGS if not plan.can_be(setting)]:
        flags = [f"--lora_bits {bits}"] * bool(bits) + [f"--optim {config.training.optim}"] * ("optim" in config.given)
        yield f"Left out, as {' and '.join(flags)} cannot be had there: {', '.join(left_out)}"
    best = plan.best(cluster, pairs)
    if not best:
        yield "Nothing fits. What would:"
        yield from what_would(plan, cluster, per_node, offload=True)
        return False
    yield from parts(plan, best, pairs)
    if best.setting.offload != "none":
        yield "Faster, because without offload:"
        yield from what_would(plan, cluster, per_node, offload=False)
    yield from over_slow_links(plan, cluster, best)
    yield f"\nAt the top of the checkout, with your data:\n{launch_line(config, best, cluster, pairs)}"
    return True


def of_heads(counts: Counts, heads: int, width: int) -> Iterator[str]:
    """What several heads add; nothing for one.

    Args:
        width: bytes of a parameter.
    """
    if heads == 1:
        return
    kept = f"; --head_anchor keeps {in_bytes(width * counts.initial)} beside them on each GPU" if counts.initial else ""
    yield (
        f"{heads} heads: {counts.heads:,} of the parameters{kept}; the saved model has their mean, and "
        f"{in_bytes(width * counts.heads)} of heads beside it"
    )


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
