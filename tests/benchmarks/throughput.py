# SPDX-License-Identifier: Apache-2.0
"""Pairs a second of this trainer, beside TRL, OpenRLHF and DeepSpeed-Chat on the same pairs and weights.

python tests/benchmarks/throughput.py --output FOLDER
python tests/benchmarks/throughput.py --output FOLDER --lengths convarg_pairs --pairs 240 --rounds 1
python tests/benchmarks/throughput.py --output FOLDER --ranked 4                 lists of 4 answers: 6 pairs each
python tests/benchmarks/throughput.py --output FOLDER --texts pairs.jsonl.gz     real pairs, words for tokens
python tests/benchmarks/throughput.py --output FOLDER --model FOLDER             an encoder, or any other model
python tests/benchmarks/throughput.py --output FOLDER --ours "plain=" --ours "zero1=--zero_stage 1"
python tests/benchmarks/throughput.py --output FOLDER --contenders trl trl_grouped --dtype bf16 --threads 2
DEEPSPEED_EXAMPLES=CHECKOUT python tests/benchmarks/throughput.py --output FOLDER --openrlhf CHECKOUT
python tests/benchmarks/throughput.py --output FOLDER --hidden 2048 --intermediate 5504 --layers 16 --heads 16 \\
    --vocabulary 32000 --pairs 2000 --batch 32                                   on a GPU: bf16, unless --dtype

TRL takes part where it can be imported. Each contender trains one pass in a process of its own, once a round, in
alternating order. FOLDER then holds throughput.json with every number and throughput.png. Speeds and ratios are medians
over the rounds, with the least and the most.

- pairs a second: all pairs ÷ the time of the whole pass. The first two steps are not timed, and count as the others
  do, by their tokens: grouped by length, they would be the widest.
- tokens a second: useful ones, P + C + R of a pair with the prompt counted once and no pad.
- ours ÷: how many times as fast as the contender ours was, in the same round.
- bound: tokens that a contender puts through its model, pads included (× 4/3 if it computes its forward pass twice),
  ÷ useful tokens. Ours cannot be faster than it by more while its time goes with tokens and its products run as fast.
- before: the peak memory of the process before its first step, libraries and weights; on a GPU the peak is the GPU's.
- limit: the rate at which this machine multiplies matrices of the model's shapes (limit.py), measured before each run.

Speeds are per CPU second, on a GPU per wall second. Other work on the machine takes no CPU seconds away, but it shares
caches, memory and perhaps the physical core: ratios of one round hold, speeds of two days may not compare. The spread
of the limit shows it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import results
import work

HERE = Path(__file__).resolve().parent
PEERS = ("upstream", "openrlhf", "trl_default", "trl", "trl_grouped")
SIZES = {"layers": 6, "hidden": 256, "intermediate": 688, "heads": 4, "vocabulary": 8192}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    kinds = sorted(path.stem for path in work.LENGTHS.glob("*.csv"))
    parser.add_argument("--lengths", choices=kinds, default="hh_rlhf_harmless_base")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="jsonl (.gz) with prompt, chosen, rejected")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a pretrained model instead of a random LLaMA")
    parser.add_argument("--ranked", type=int, metavar="K", help="lists of K answers, as pairs")
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--limit", type=int, default=512, help="tokens of a text; the prompt loses what is over")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="and as many cores")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="[fp32, on a GPU bf16]; bf16: autocast for the peers")
    parser.add_argument("--contenders", nargs="+", choices=("ours", *PEERS), default=["ours", *PEERS])
    parser.add_argument(
        "--ours",
        action="append",
        metavar="NAME=FLAGS",
        help="a variant of ours, with more flags of main.py; repeatable",
    )
    parser.add_argument("--openrlhf", type=Path, metavar="FOLDER", help="a checkout of OpenRLHF")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def settle(threads: int, folder: Path) -> None:
    """Keep this process and those that it starts to so many cores and threads, and off the network and the home."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"--threads {threads}: there are {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    os.environ |= own


def prepare(options: argparse.Namespace, folder: Path) -> list[work.Pair]:
    """Write the work into a folder; its pairs."""
    if options.model:
        options.vocabulary = work.vocabulary_of(options.model)
    draw = work.Draw(options.vocabulary, options.limit)
    if options.texts:
        pairs = draw.real(options.texts, options.pairs)
    elif options.ranked:
        pairs = draw.ranked(work.read_lengths(options.lengths), options.pairs, options.ranked)
    else:
        pairs = draw.pairs(work.read_lengths(options.lengths), options.pairs)
    if len(pairs) <= 2 * options.batch:
        raise SystemExit(f"{len(pairs)} pairs are no three steps of {options.batch}: more --pairs or a smaller --batch")
    work.write_data(folder / "data", pairs, draw)
    # by a process of its own: one that has held a model hands its peak memory on to those that it starts
    sizes = {name: getattr(options, name) for name in SIZES}
    call("work.py", folder / "model", json.dumps({"given": str(options.model)} if options.model else sizes))
    return pairs


def contenders(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name → arguments of peers.py, without those whose library or checkout is missing."""
    missing = {}
    if not importlib.util.find_spec("trl"):
        missing |= dict.fromkeys(("trl", "trl_default", "trl_grouped"), "TRL cannot be imported")
    if not options.openrlhf:
        missing["openrlhf"] = "--openrlhf names no checkout"
    if not os.environ.get("DEEPSPEED_EXAMPLES"):
        missing["upstream"] = "DEEPSPEED_EXAMPLES names no checkout"
    found = {}
    for name in options.contenders:
        if name in missing:
            print(f"without {name}: {missing[name]}")
        elif name == "ours":
            found |= {variant: ["ours", f"--flags={flags}"] for variant, flags in variants(options.ours).items()}
        else:
            found[name] = [name, *(["--openrlhf", str(options.openrlhf)] if name == "openrlhf" else [])]
    return found


def variants(given: list[str] | None) -> dict[str, str]:
    """Name → flags of main.py, from NAME=FLAGS, or FLAGS alone for a variant called ours."""
    parts = [re.fullmatch(r"(?:([\w.]+)=)?(.*)", text.strip()) for text in given or [""]]
    return {part[1] or "ours": part[2] for part in parts}


def call(script: str, *arguments: object) -> dict:
    """Run a script of this folder in a process of its own; the line of JSON that it ends with."""
    words = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_rounds(options: argparse.Namespace, folder: Path, pairs: int, rows: int) -> dict[str, list[dict]]:
    """Name → a result for each round, with what limit.py measured before it, for ``rows`` tokens a step, as "limit"."""
    found = contenders(options)
    runs: dict[str, list[dict]] = {name: [] for name in found}
    settings = ["--batch", options.batch, "--limit", options.limit, "--dtype", options.dtype]
    for number in range(options.rounds):
        for name in list(found) if number % 2 == 0 else reversed(found):
            contender, *rest = found[name]
            limit = call("limit.py", folder, "--rows", rows, "--dtype", options.dtype)
            run = call("peers.py", contender, folder, *settings, *rest) | {"limit": limit}
            if run["pairs"] != pairs:
                raise SystemExit(f"{name} trained {run['pairs']} of {pairs} pairs")
            runs[name].append(run)
            print(
                f"round {number + 1}: {name}: {run['timed_pairs']} pairs in {run['cpu_seconds']:.1f} CPU seconds, "
                f"{run['wall_seconds']:.1f} s, loss {run['first_loss']:.3f} to {run['last_loss']:.3f}",
                flush=True,
            )
    return runs


def has_gpu() -> bool:
    """Asked in a process of its own: this one is to stay small."""
    words = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(words).returncode == 0


def main() -> None:
    options = parse()
    folder = options.output.resolve() / "work"
    settle(options.threads, folder)
    options.dtype = options.dtype or ("bf16" if has_gpu() else "fp32")
    pairs = prepare(options, folder)
    useful = work.tokens_once(pairs)
    title = f"{len(pairs)} pairs, {options.texts.name if options.texts else options.lengths}"
    title += f", lists of {options.ranked}" if options.ranked else ""
    title += f", {options.dtype}, {options.threads} thread{'s' if options.threads > 1 else ''}"
    print(f"{title}: {useful} tokens with each prompt once a pair, {work.tokens_once_a_list(pairs)} once a list")
    runs = run_rounds(options, folder, len(pairs), rows=round(useful * options.batch / len(pairs)))
    ours = [name for name in variants(options.ours) if name in runs]
    rows = results.summarize(runs, pairs, ours)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    everything = {"settings": settings, "useful_tokens": useful, "summary": rows, "runs": runs}
    (options.output / "throughput.json").write_text(json.dumps(everything, indent=1) + "\n")
    limits = [run["limit"] for rounds in runs.values() for run in rounds]
    results.show(rows, limits, with_lists=bool(options.ranked))
    results.draw(rows, limits, useful / len(pairs), options.output / "throughput.png", title)


if __name__ == "__main__":
    main()
