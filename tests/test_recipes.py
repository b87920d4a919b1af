# SPDX-License-Identifier: Apache-2.0
"""The recipes in training_scripts/recipes: what they would start, and that README's table says the same."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import runs
from flags import read

TOP = Path(__file__).resolve().parent.parent
SCRIPTS = TOP / "training_scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*.sh"))
BASH = shutil.which("bash")
UPSTREAM = "applications/DeepSpeed-Chat/training/step2_reward_model_finetuning/training_scripts"

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def run(words, folder, **environment):
    """Standard output of a command that succeeds, without what a launcher would read of this environment."""
    values = runs.environment(**environment)
    result = subprocess.run(words, cwd=folder, env=values, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def dry_run(recipe, folder, *flags, **environment):
    """main.py's words in each command that the recipe would run."""
    values = runs.environment(**environment, DRY_RUN="1")
    result = subprocess.run([BASH, str(recipe), *flags], cwd=folder, env=values, capture_output=True, text=True)
    printed, wrong = result.stdout, result.stderr  # a model or data that is not here is said after the commands
    assert (result.returncode, wrong) == (0, "") or re.fullmatch(r"error: .* no such .*\n", wrong)
    lines = [line for line in printed.splitlines() if line and not line.startswith("#")]
    return [after_main(shlex.split(line)) for line in lines]


def after_main(words):
    for i, word in enumerate(words):
        if word.endswith("main.py"):
            return words[i + 1 :]
    return after_main(shlex.split(words[-1]))  # bash -c '…'


def hostfile(folder, hosts):
    file = folder / "hosts"
    file.write_text("".join(f"node-{i} slots=8\n" for i in range(hosts)))
    return str(file)


def written_for(recipe):
    """Micro batch, accumulation and GPUs in the comment beside GLOBAL_BATCH."""
    text = recipe.read_text(encoding="utf-8")
    global_batch, *parts = map(
        int,
        re.search(
            r"^GLOBAL_BATCH=\$\{GLOBAL_BATCH:-(\d+)\} +# (?:pairs|lists) = (\d+) × (\d+) × (\d+): ", text, re.M
        ).groups(),
    )
    assert global_batch == parts[0] * parts[1] * parts[2]
    return parts


def rows_of_readme():
    """Recipe → model, hardware, ZeRO stage, global batch and learning rate as README's table has them."""
    text = (SCRIPTS / "recipes" / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0]: row[1:6] for row in rows if row[0].endswith(".sh") and len(row) == 7}


def test_readmes_table_names_the_recipes():
    assert sorted(rows_of_readme()) == [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_what_it_says(recipe, tmp_path):
    """On the GPUs it is written for: the batches of its comment, and README's numbers."""
    micro, accumulation, gpus = written_for(recipe)
    several = gpus > 8
    place = {"HOSTFILE": hostfile(tmp_path, gpus // 8), "LAUNCHER": "torchrun"} if several else {"NUM_GPUS": str(gpus)}
    commands = dry_run(recipe, tmp_path, **place)
    assert len(commands) == (gpus // 8 if several else 1)
    options = read(commands[0])
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (micro, accumulation)
    assert options.output_dir == str(tmp_path / "output")
    model, hardware, stage, batch, rate = rows_of_readme()[recipe.name]
    assert (model, int(stage), int(batch)) == (
        options.model_name_or_path,
        options.zero_stage,
        micro * accumulation * gpus,
    )
    rates = {options.learning_rate} | ({options.lora_learning_rate} if options.lora_dim else set())
    assert rates == {float(rate)}
    number, nodes = re.match(r"(\d+)( nodes of 8)? × \d+ GB", hardware).groups()
    assert int(number) * (8 if nodes else 1) == gpus


@pytest.mark.parametrize("launch", ["single_gpu.sh", "single_node.sh", "multi_node.sh", "slurm.sbatch"])
def test_every_launcher_runs_a_recipe_with_its_batch(launch, tmp_path):
    """Names with spaces and quotes come through, and the flags of the command line are last."""
    recipe, model, data = SCRIPTS / "recipes" / "llama-2-7b.sh", 'a b\'s "model" $HOME', "my data/*.jsonl"
    place = {"HOSTFILE": hostfile(tmp_path, 2), "LAUNCHER": "torchrun"} if launch == "multi_node.sh" else {}
    if launch == "single_node.sh":
        place = {"NUM_GPUS": "8"}
    flags = ["--zero_stage", "2", "--output_dir", "it's here"]
    commands = dry_run(recipe, tmp_path, *flags, LAUNCH=launch, MODEL=model, DATA=data, **place)
    assert len(commands) == (2 if launch == "multi_node.sh" else 1)
    for words in commands:
        assert words[-len(flags) :] == flags
        options = read(words)
        assert (options.model_name_or_path, options.data_path, options.zero_stage) == (model, [data], 2)
        processes = {"single_gpu.sh": 1, "single_node.sh": 8}.get(launch, 16)
        assert options.per_device_train_batch_size * options.gradient_accumulation_steps * processes == 64
        assert options.per_device_train_batch_size <= 8


def test_a_copy_elsewhere_finds_the_launchers(tmp_path):
    copy = shutil.copy(SCRIPTS / "recipes" / "opt-1.3b.sh", tmp_path)
    assert read(dry_run(copy, tmp_path, NUM_GPUS="8", SCRIPTS=str(SCRIPTS))[0]).zero_stage == 2


def test_ones_own_data_takes_the_place_of_upstreams_sets_and_split(tmp_path):
    recipe = SCRIPTS / "recipes" / "opt-350m.sh"
    theirs, mine = (read(dry_run(recipe, tmp_path, NUM_GPUS="1", **data)[0]) for data in ({}, {"DATA": "mine.jsonl"}))
    assert (len(theirs.data_path), theirs.data_split) == (4, "2,4,4")
    assert (mine.data_path, mine.data_split) == (["mine.jsonl"], None)


def test_micro_batch_keeps_the_global_one(tmp_path):
    options = read(dry_run(SCRIPTS / "recipes" / "qwen3-8b.sh", tmp_path, NUM_GPUS="4", MICRO_BATCH="2")[0])
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (2, 256 // (2 * 4))


def test_sbatch_gets_its_options_and_the_settings(tmp_path):
    """A stub in its place prints what it was given."""
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$GLOBAL_BATCH" "$MODEL" "$SCRIPTS"\n')
    stub.chmod(0o755)
    place = {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", "LAUNCH": "slurm.sbatch", "DRY_RUN": "0"}
    recipe = SCRIPTS / "recipes" / "llama-3-70b.sh"
    said = run(
        [BASH, str(recipe), "--seed", "7"], tmp_path, SBATCH_OPTIONS="--nodes 4", MODEL="a b", **place
    ).splitlines()
    assert said[:3] == ["--export=ALL", "--nodes", "4"]  # whatever the site's own --export is
    assert Path(said[3]).resolve() == SCRIPTS / "slurm.sbatch"
    assert said[-5:-1] == ["--seed", "7", "512", "a b"]
    assert Path(said[-1]).resolve() == SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "family"), [("gpt2-large", "gpt2"), ("deberta-v3-large", "deberta")])
def test_a_recipe_of_lists_trains_a_tiny_model_of_its_family(recipe, family, tmp_path):
    """Scores begin and end with standard deviation 1 where the recipe says so."""
    models.write(family, tmp_path / "model", n_positions=1024, max_position_embeddings=512)
    words = ["the cat", "the mat", "no fish", "and so on", "where is it"]
    for name, first, last in (("train", 0, 96), ("eval", 96, 112)):
        rows = [
            {
                "prompt": f"the question {i}: {words[i % 5]}?",
                "responses": [f" {w} {i}" for w in words[:4]],
                "ranks": ranks,
            }
            for i in range(first, last)
            for ranks in [[(k + i) % 4 for k in range(4)]]
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {"MODEL": str(tmp_path / "model"), "DATA": str(tmp_path / "train.jsonl"), "PYTHON": sys.executable}
    place |= {"LAUNCH": "single_gpu.sh", "OUTPUT": str(tmp_path / "out"), "DRY_RUN": "0", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--eval_data_path", str(tmp_path / "eval.jsonl"), "--max_seq_len", "64"]
    values = runs.environment(**place)
    command = [BASH, str(SCRIPTS / "recipes" / f"{recipe}.sh"), *flags]
    result = subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["split"] == "train" for record in records) == 3
    before = next(record for record in records if record["split"] == "eval")
    normalized = [record for record in records if record["split"] == "normalize"]
    if recipe == "gpt2-large":
        assert "(--normalize_before)" in result.stdout + result.stderr
        assert before["chosen_std"] == pytest.approx(1, abs=0.5)
        assert normalized[0]["std_after"] == pytest.approx(1, abs=1e-3)
    else:
        assert before["chosen_std"] < 0.2 and not normalized


@pytest.mark.skipif(not os.environ.get("DEEPSPEED_EXAMPLES"), reason="set DEEPSPEED_EXAMPLES to a checkout")
def test_upstreams_launch_lines_start_this_main(tmp_path):
    """Their scripts, run in training_scripts, call main.py there, with flags that are all known."""
    stub = tmp_path / "bin" / "deepspeed"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    scripts = sorted((Path(os.environ["DEEPSPEED_EXAMPLES"]) / UPSTREAM).glob("*/**/run_*b*.sh"))
    assert scripts
    for i, script in enumerate(scripts):
        output = tmp_path / f"output-{i}"
        run([BASH, str(script), str(output), "2"], SCRIPTS, PATH=path)
        folder, *words = (output / "training.log").read_text().splitlines()
        assert Path(folder).resolve() == SCRIPTS
        assert words[: words.index("main.py")] in ([], ["--num_gpus", "1"])
        options = read(words[words.index("main.py") + 1 :])
        assert (options.zero_stage, options.output_dir) == (2, str(output))
