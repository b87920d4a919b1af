#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The defect that began this: step 2 of April 2023 with its own loss, and with the drop-in, on the same pairs.

    DEEPSPEED_EXAMPLES=<checkout> python tests/upstream/show_inf.py [output folder]

Step 2 of ab4e2e5 does not run on today's libraries, so both sides get the patches that make it run; one side lacks
the two that bring the drop-in and its flags, and keeps -log(sigmoid(x)). Model, seed and pairs are the same: a tiny OPT
with random weights, 600 pairs, 4 % of them with chosen and rejected exchanged. Its head is multiplied once, at the
start, so that scores differ by as much as those of a model that trained for long. Writes inf.json and inf.png.
"""

import json
import math
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]
import models
import patched
import tiny

SETTINGS = {"fp16": 20, "bf16": 400}  # what the head is multiplied by; a loss is inf from a gap of -17.3, -89 on
PAIRS = 600
LOSSES = {"unpatched": "-log(sigmoid(x)), as in ab4e2e5", "patched": "-logsigmoid(x), the drop-in"}
BEFORE_TRAINING = """
    # show_inf.py, on both sides: a head as large as a long training makes it, float16 on any CPU, the loss of each step
    rm_model.v_head.weight.data.mul_({factor})
    type(get_accelerator()).is_fp16_supported = lambda self: True
    train_phase = 2
"""
EVERY_STEP = """            mean_loss += loss.item()
            gap = (outputs["chosen_mean_scores"] - outputs["rejected_mean_scores"]).float()
            print_rank_0(f"step loss {loss.item()} gap {gap.abs().max().item()}", args.global_rank)
"""


def write_pairs(folder):
    """Good wins over bad, but for every twenty-fifth pair."""
    rng = random.Random(0)
    patched.write_data(folder, rows=PAIRS, held_out=50)
    file = folder / "hub" / "Dahoas" / "rm-static" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rng.sample(rows, PAIRS // 25):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder):
    models.write("opt", folder)
    tiny.tokenizer(folder, opening="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    return folder


def make_tree(folder, data, side, factor):
    """ab4e2e5 made to run, with the drop-in or without."""
    patched.export(patched.PINS["legacy"], folder)
    for patch in sorted((patched.PATCHES / "legacy").glob("*.patch")):
        if side == "patched" or not re.search("drop-in|loss-flags", patch.name):
            patched.git_apply(folder, patch)
    main = folder / patched.CHAT / "training" / "step2_reward_model_finetuning" / "main.py"
    text = main.read_text()
    for old, new in {
        "\n    train_phase = 2\n": BEFORE_TRAINING.format(factor=factor),
        "            mean_loss += loss.item()\n": EVERY_STEP,
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    main.write_text(text)
    return patched.Tree(folder, "legacy", data)


def train(tree, model, dtype, pairs=PAIRS):
    """One epoch: the loss of every step, and how the run ended."""
    flags = ["--dtype", dtype, "--data_split", f"0,{pairs},{PAIRS - pairs}", "--learning_rate", "1e-3"]
    run = tree.step2(model, tree.folder / "output", *flags, succeed=False)
    steps = re.findall(r"^step loss (\S+) gap (\S+)", run.result.stdout, re.MULTILINE)
    losses = [float(loss) for loss, _ in steps]
    gave_up = re.search(r"Current loss scale already at minimum[^\n]*", run.output)
    assert losses, run.result.stdout[-3000:]
    return {
        "losses": losses,
        "first_gap": float(steps[0][1]),  # the largest difference of two scores in the first batch
        "finite": sum(map(math.isfinite, losses)),
        "exit_status": run.result.returncode,
        "accuracy": [evaluation[-1] for evaluation in run.evaluations],
        "message": gave_up[0] if gave_up else "",
    }


def compare(folder, dtype, pairs=PAIRS):
    """Both sides in one precision."""
    data = folder / "data"
    if not data.exists():
        write_pairs(data)
        write_model(folder / "model")
    results = {}
    for side in LOSSES:
        tree = make_tree(folder / f"{dtype}-{side}", data, side, SETTINGS[dtype])
        results[side] = train(tree, folder / "model", dtype, pairs)
    return results


def draw(results, picture):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(11, 6), sharex=True, sharey="row", constrained_layout=True)
    for row, (dtype, sides) in zip(axes, results.items()):
        finite = [x for side in sides.values() for x in side["losses"] if math.isfinite(x)]
        top = 1.15 * max(finite)
        for axis, (side, result) in zip(row, sides.items()):
            losses = result["losses"]
            shown = [min(x, top) if not math.isnan(x) else top for x in losses]
            steps = range(1, len(losses) + 1)
            broken = [step for step, x in zip(steps, losses) if not math.isfinite(x)]
            whole = [(step, x) for step, x in zip(steps, shown) if step not in set(broken)]
            if whole:
                axis.plot(*zip(*whole), color="#2a6f97")
            axis.plot(broken, [0.95 * top] * len(broken), "x", color="#c1553b", label="inf or NaN")
            end = f", accuracy {result['accuracy'][0]:.2f} → {result['accuracy'][-1]:.2f}"
            if result["exit_status"]:
                end = ", then the run dies"
            axis.set(title=f"{dtype}, {LOSSES[side]}\n{result['finite']} of {len(losses)} losses finite{end}")
            axis.set(ylim=(0, top), xlabel="step", ylabel="loss")
            if broken:
                axis.legend(frameon=False, loc="center right")
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main():
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = {dtype: compare(Path(folder), dtype) for dtype in SETTINGS}
    (target / "inf.json").write_text(json.dumps(results, indent=1))
    draw(results, target / "inf.png")
    for dtype, sides in results.items():
        for side, result in sides.items():
            ended = result["message"] or f"accuracy {result['accuracy'][0]:.2f} to {result['accuracy'][-1]:.2f}"
            steps = f"{result['finite']} of {len(result['losses'])} losses finite"
            print(f"{dtype} {side}: largest gap at first {result['first_gap']:.0f}, {steps}; {ended}")


if __name__ == "__main__":
    main()
