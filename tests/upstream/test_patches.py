# SPDX-License-Identifier: Apache-2.0
"""The patches on upstream's own commits, in the checkout that DEEPSPEED_EXAMPLES names: they go in, the steps run."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import models
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent))
import patched
import show_inf

from reward_model.models import saving
from reward_model.models.loading import load_for_training

FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "bloom", "qwen2", "qwen3")
LAYOUTS = ("package", "legacy")
RW_EVAL = "step2_reward_model_finetuning/rw_eval.py"
POSITIONS = {"max_position_embeddings": 512, "n_positions": 512}  # rw_eval pads to 512

# Scores of the evaluation rows by the tree's own loading code, and what it takes for them to be right
SCORES = """
import glob, json, sys, torch
folder, cache, layout, leading = sys.argv[1:]
if layout == "package":
    from dschat.utils.data.reward_batch import RewardCollator
    from dschat.utils.data.row_cache import SavedRows
    from dschat.utils.model.model_utils import create_critic_model
    from dschat.utils.utils import load_hf_tokenizer
    tokenizer = load_hf_tokenizer(folder)
else:
    from transformers import AutoTokenizer
    from utils.data.reward_batch import RewardCollator
    from utils.data.row_cache import SavedRows
    from utils.model.model_utils import create_critic_model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
model = create_critic_model(folder, tokenizer, None, int(leading), rlhf_training=True).eval()
(file,) = glob.glob(cache + "/*/evaldata_*.safetensors")
rows = SavedRows(file)
with torch.no_grad():
    out = model(**RewardCollator(int(leading))([rows[i] for i in range(len(rows))]))
chosen, rejected = out["chosen_mean_scores"], out["rejected_mean_scores"]
print(json.dumps([chosen.mean().item(), rejected.mean().item(), (chosen > rejected).float().mean().item()]))
"""

EMULATE_FLOAT16 = """
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
CPU_Accelerator.is_fp16_supported = lambda self: True
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    patched.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trees(tmp_path_factory, data):
    """Patched trees, one of each layout."""
    made = {}

    def tree(layout="package"):
        if layout not in made:
            folder = patched.export(patched.PINS[layout], tmp_path_factory.mktemp(layout))
            result = patched.apply("apply", folder)
            assert result.returncode == 0, result.stderr
            made[layout] = patched.Tree(folder, layout, data)
        tree = made[layout]
        shutil.rmtree(tree.cache, ignore_errors=True)
        return tree

    return tree


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tiny models with the tokenizers of their families."""
    root = tmp_path_factory.mktemp("models")

    def folder(family):
        path = root / ("bigscience/bloom-tiny" if family == "bloom" else family)
        if not path.exists():
            path.mkdir(parents=True)
            models.write(family, path, **POSITIONS)
            if family == "opt":  # its start token is its end token, which upstream makes the pad
                tiny.tokenizer(path, opening="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")
            if family == "llama":
                tiny.llama(path, eos_token="</s>", pad_token=None)
        return path

    return folder


def leading_pads(family):
    return 1 if family == "opt" else 0


def reloaded(tree, folder, family="opt"):
    result = tree.python(SCORES, folder, tree.cache, tree.layout, leading_pads(family))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def same_scores(seen, expected):
    """bfloat16 keeps 8 bits; batches of other sizes round differently."""
    assert seen == pytest.approx(expected, abs=1e-2)


# Scores by step 3's own loading code of token ids that are padded on the right
STEP_3 = """
import json, sys, torch
from transformers import AutoTokenizer
from dschat.utils.model.model_utils import create_critic_model
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = create_critic_model(folder, tokenizer, None, 0, rlhf_training=True).eval()
mask = (ids != tokenizer.pad_token_id).long()
with torch.no_grad():
    print(json.dumps(model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"].tolist()))
"""


@pytest.mark.parametrize("patches", ["all", "the imports"])
@pytest.mark.parametrize("form", ["dschat", "both"])
@pytest.mark.parametrize("rows", [320, 512])
def test_step_3_loads_what_the_trainer_saves(trees, tmp_path, patches, form, rows):
    """Whether its embedding shrinks or not: Qwen 2.5 has 151,936 rows for 151,665 tokens."""
    tree = trees()
    if patches != "all":
        folder = patched.export(patched.PINS["package"], tmp_path / "tree")
        patched.git_apply(folder, patched.PATCHES / "0010-import-from-transformers-5.patch")
        tree = patched.Tree(folder, "package", tree.data)
    tokenizer = models.write("qwen2", tmp_path / "base", vocab_size=rows)
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=0)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saving.save(scorer, tokenizer, tmp_path / "out", form)
    batch = models.batch(tokenizer)
    at = torch.arange(len(batch.ends)) * batch.input_ids.shape[1] + batch.ends
    with torch.no_grad():
        expected = scorer.eval()(batch.input_ids, batch.attention_mask, at)
    result = tree.python(STEP_3, tmp_path / "out", json.dumps(batch.input_ids.tolist()))
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_leaves_every_byte(layout, tmp_path):
    tree = patched.export(patched.PINS[layout], tmp_path)
    before = patched.contents(tree)
    for command in ("check", "apply", "revert", "apply", "revert"):
        result = patched.apply(command, tree)
        assert result.returncode == 0, result.stderr
        assert (patched.contents(tree) == before) == (command != "apply")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_commit_of_the_layout(tmp_path, layout):
    first, last = patched.RANGES[layout]
    paths = [f"{patched.CHAT}/dschat", f"{patched.CHAT}/training"]
    commits = patched.git("rev-list", f"{first}^..{last}", "--", *paths).decode().split()
    assert len(commits) >= 8
    for commit in commits:
        tree = patched.export(commit, tmp_path / commit)
        before = patched.contents(tree)
        for command in ("apply", "revert"):
            result = patched.apply(command, tree)
            assert result.returncode == 0, f"{commit}: {result.stderr}"
            if command == "apply":
                for file in tree.rglob("*.py"):
                    compile(file.read_text(), file, "exec")
        assert patched.contents(tree) == before, commit
        shutil.rmtree(tree)


@pytest.mark.parametrize("family", FAMILIES)
def test_step2_saves_what_loads_with_the_same_scores(trees, model, tmp_path, family):
    tree = trees()
    leading = ["--num_padding_at_beginning", leading_pads(family)]
    run = tree.step2(model(family), tmp_path, "--zero_stage", 2, "--num_train_epochs", 3, *leading)
    assert run.evaluations[-1][2] > 0.8  # it learned
    same_scores(reloaded(tree, tmp_path, family), run.evaluations[-1])


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (1, 2), (3, 1), (3, 2)])
def test_every_stage_trains_and_saves(trees, model, tmp_path, stage, processes):
    tree = trees()
    run = tree.step2(model("opt"), tmp_path, "--zero_stage", stage, processes=processes)
    assert ("taking zero_stage 1" in run.output) == (stage == 0)
    same_scores(reloaded(tree, tmp_path), run.evaluations[-1])


@pytest.mark.parametrize("stage", [0, 3])
def test_float16(trees, model, tmp_path, stage):
    """On a CPU that only emulates it, which DeepSpeed has to be told."""
    tree = trees()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(EMULATE_FLOAT16)
    path = f"{site}{os.pathsep}{tree.package}"
    run = tree.step2(model("opt"), tmp_path / "o", "--dtype", "fp16", "--zero_stage", stage, PYTHONPATH=path)
    state = torch.load(patched.output_of(tmp_path / "o"), weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    same_scores(reloaded(tree, tmp_path / "o"), run.evaluations[-1])


def test_lora_and_checkpointing(trees, model, tmp_path):
    tree = trees()
    flags = ["--lora_dim", 8, "--lora_module_name", "layers.", "--only_optimize_lora", "--gradient_checkpointing"]
    run = tree.step2(model("llama"), tmp_path, "--num_padding_at_beginning", 0, "--num_train_epochs", 2, *flags)
    same_scores(reloaded(tree, tmp_path, "llama"), run.evaluations[-1])


@pytest.mark.parametrize(("family", "stage"), [("opt", 0), ("llama", 2), ("bloom", 3)])
def test_legacy_step2_trains_and_saves(trees, model, tmp_path, family, stage):
    tree = trees("legacy")
    leading = ["--num_padding_at_beginning", leading_pads(family)]
    run = tree.step2(model(family), tmp_path, "--zero_stage", stage, "--num_train_epochs", 3, *leading)
    assert run.evaluations[-1][1] > 0.8
    chosen, _, accuracy = reloaded(tree, tmp_path, family)
    same_scores([chosen, accuracy], run.evaluations[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rw_eval_scores_the_trained_model(trees, model, tmp_path, layout):
    tree = trees(layout)
    tree.step2(model("opt"), tmp_path)
    twice = []
    for _ in range(2):
        result = tree.run(
            "step2_reward_model_finetuning/rw_eval.py", "--model_name_or_path", tmp_path, launcher="python"
        )
        assert result.returncode == 0, result.stderr[-3000:]
        twice.append(re.findall(r"_ans score:\s+(\S+)", result.stdout))
    assert len(twice[0]) == 4
    assert twice[0] == twice[1]  # a random head gives other ones each time


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_every_spelling(trees, model, tmp_path, layout):
    tree = trees(layout)
    run = tree.step2(model("opt"), tmp_path)
    file = patched.output_of(tmp_path)
    state = torch.load(file, weights_only=True)
    old = {name.replace("rwtransformer.", "rwtranrsformer."): tensor for name, tensor in state.items()}
    old["rwtranrsformer.decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # saved by old versions
    torch.save(old, file)
    scores = reloaded(tree, tmp_path)
    same_scores(scores if layout == "package" else [scores[0], scores[2]], run.evaluations[-1])
    del old["v_head.weight"]
    torch.save(old, file)
    failed = tree.python(SCORES, tmp_path, tree.cache, layout, 1)
    assert failed.returncode != 0
    assert "lacks 1 of the model's" in failed.stderr and "v_head.weight" in failed.stderr


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_every_launcher_gives_the_same(trees, model, tmp_path, launcher):
    tree = trees()
    expected = tree.step2(model("opt"), tmp_path).evaluations
    assert tree.step2(model("opt"), tmp_path, launcher=launcher).evaluations == expected


@pytest.mark.parametrize(("family", "stage"), [("opt", 2), ("opt", 3), ("llama", 2)])
def test_ppo_runs_on_what_step2_saved(trees, model, tmp_path, family, stage):
    tree = trees()
    leading = leading_pads(family)
    tree.step2(model(family), tmp_path / "reward", "--num_padding_at_beginning", leading)
    flags = {
        "data_path": tree.data / "Dahoas" / "rm-static", "data_output_path": tree.cache,
        "actor_model_name_or_path": model(family), "critic_model_name_or_path": tmp_path / "reward",
        "max_prompt_seq_len": 48, "max_answer_seq_len": 16, "per_device_generation_batch_size": 4,
        "per_device_training_batch_size": 4, "actor_zero_stage": stage, "critic_zero_stage": stage, "dtype": "bf16",
        "num_padding_at_beginning": leading, "test_stop_step": 2, "seed": 1, "num_warmup_steps": 0,
        "output_dir": tmp_path / "ppo",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    result = tree.run("step3_rlhf_finetuning/main.py", *words, "--enable_test_mode", "--deepspeed", timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(re.findall(r"Average reward score: [-\d.e]+", result.stdout)) == 2
    critic = torch.load(patched.output_of(tmp_path / "ppo" / "critic"), weights_only=True)
    assert "v_head.weight" in critic


@pytest.mark.parametrize("step", ["step1_supervised_finetuning", "step2_dpo_finetuning"])
def test_the_other_steps_run_without_a_launcher(trees, model, tmp_path, step):
    """They share the patched files; what they save loads as a causal model, tokenizer and all."""
    tree = trees()
    flags = {
        "data_path": tree.data / "Dahoas" / "rm-static", "data_output_path": tree.cache, "max_seq_len": 64,
        "model_name_or_path": model("opt"), "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "dtype": "bf16", "zero_stage": 1, "output_dir": tmp_path,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    result = tree.run(f"{step}/main.py", *words, "--deepspeed", launcher="python")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    state = torch.load(patched.output_of(tmp_path), weights_only=True)
    assert "lm_head.weight" in state or "model.decoder.embed_tokens.weight" in state
    assert (tmp_path / "tokenizer_config.json").is_file()


def test_no_new_flag_no_new_loss(trees, model, tmp_path):
    """And each flag reaches the loss."""
    tree = trees()
    fixed = ["--learning_rate", 0]  # all runs then see the same scores
    plain = tree.step2(model("opt"), tmp_path, *fixed, launcher="python").losses
    neutral = ["--margin", 0, "--label_smoothing", 0, "--loss_level", "token"]
    assert tree.step2(model("opt"), tmp_path, *fixed, *neutral, launcher="python").losses == plain
    changed = {}
    for flags in (
        ["--margin", "1"],
        ["--margin", "column"],
        ["--label_smoothing", "0.3"],
        ["--score_penalty", "l2", "--score_penalty_weight", "10"],
        ["--loss_level", "sequence"],
        ["--exclude_pads"],
    ):
        changed[" ".join(flags)] = tree.step2(model("opt"), tmp_path, *fixed, *flags, launcher="python").losses[0]
    assert len({*plain, *changed.values()}) == 7, (plain, changed)
    assert changed["--margin column"] > changed["--margin 1"] > plain[0]  # margins of 0.5 and 2


@pytest.mark.parametrize("flags", [["--margin", "much"], ["--label_smoothing", "0.9"], ["--score_penalty", "l3"]])
def test_a_wrong_flag_is_named(trees, model, tmp_path, flags):
    run = trees().step2(model("opt"), tmp_path, *flags, succeed=False, launcher="python")
    assert run.result.returncode == 2
    assert f"argument {flags[0]}" in run.result.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_help(trees, layout):
    result = trees(layout).run("step2_reward_model_finetuning/main.py", "--help", launcher="python")
    assert result.returncode == 0
    assert "--score_penalty" in result.stdout


def test_rows_without_a_margin_stop_the_run_before_it_trains(trees, model, tmp_path):
    tree = trees()
    folder = tree.chat / "data"
    folder.mkdir()
    rows = [{"prompt": f"Human: {i} Assistant:", "chosen": "good", "rejected": "bad", "margin": 1} for i in range(40)]
    rows[3]["margin"] = None
    try:
        for name in ("train", "eval"):
            (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--data_path", "local/jsonfile", "--data_split", "0,1,0", "--margin", "column"]
        run = tree.step2(model("opt"), tmp_path, *flags, succeed=False, launcher="python")
    finally:
        shutil.rmtree(folder)
    assert run.result.returncode != 0
    assert "1 of 40 training rows have no number in a column margin" in run.output
    assert not run.evaluations


def test_ranks_count_every_pair_once(trees, model, tmp_path):
    """19 of 60 evaluation rows: two ranks share them unevenly."""
    tree = trees()
    flags = ["--data_split", "30,19,11", "--learning_rate", 0]
    alone = tree.step2(model("opt"), tmp_path, *flags)
    assert "size=19\n" in alone.output
    together = tree.step2(model("opt"), tmp_path, *flags, processes=2).evaluations[0]
    assert together == pytest.approx(alone.evaluations[0], abs=2e-3)


def test_an_incomplete_step_is_a_step(trees, model, tmp_path):
    """12 batches, 5 to a step: 2 full steps and one of 2."""
    flags = ["--gradient_accumulation_steps", 5, "--eval_interval", 1, "--eval_iters", 1, "--num_train_epochs", 2]
    run = trees().step2(model("opt"), tmp_path, *flags)
    assert re.findall(r"^Iter (\d+): Evaluating", run.result.stdout, re.MULTILINE) == list("123456")


def test_no_rows_to_evaluate_on(trees, model, tmp_path):
    """One row of 240 to train on, and of 60 none."""
    run = trees().step2(model("opt"), tmp_path, "--data_split", "199,1,0")
    assert "no rows to evaluate on" in run.output
    assert run.losses


def test_changed_rows_and_tokens_are_seen(trees, model, tmp_path):
    """train.json under applications/DeepSpeed-Chat/data, as --data_path local/jsonfile reads it."""
    tree = trees()
    folder = tree.chat / "data"
    folder.mkdir()
    rows = [{"prompt": f"Human: {i} Assistant:", "chosen": "good", "rejected": "bad"} for i in range(40)]
    still = ["--data_path", "local/jsonfile", "--learning_rate", 0]
    try:
        for name in ("train", "eval"):
            (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first = tree.step2(model("opt"), tmp_path, *still)
        assert tree.step2(model("opt"), tmp_path, *still).losses == first.losses
        with_token = tree.step2(model("opt"), tmp_path, *still, "--add_eot_token")
        (folder / "train.json").write_text("".join(json.dumps(row | {"chosen": "worse"}) + "\n" for row in rows))
        assert tree.step2(model("opt"), tmp_path, *still).losses != first.losses
    finally:
        shutil.rmtree(folder)
    assert len(list(tree.cache.iterdir())) == 3  # the first rows, with another token, and the changed rows
    assert with_token.losses


def test_a_planted_cache_is_refused(trees, model, tmp_path):
    tree = trees()
    tree.cache.mkdir(mode=0o777)
    os.chmod(tree.cache, 0o777)
    run = tree.step2(model("opt"), tmp_path, succeed=False, launcher="python")
    assert run.result.returncode != 0
    assert "others may write to it" in run.output
    os.chmod(tree.cache, 0o755)
    tree.step2(model("opt"), tmp_path, launcher="python")
    files = [file for file in tree.cache.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".npy"}
    assert not any(b"\x80\x04" in file.read_bytes()[:200] for file in files)  # a pickle's first bytes


@pytest.mark.parametrize("dtype", show_inf.SETTINGS)
def test_the_old_loss_breaks_a_run_that_the_drop_in_finishes(tmp_path, dtype):
    results = show_inf.compare(tmp_path, dtype)
    old, new = results["unpatched"], results["patched"]
    assert old["first_gap"] == pytest.approx(new["first_gap"], rel=0.01)  # the same model and pairs
    assert old["finite"] < len(old["losses"])
    assert new["finite"] == len(new["losses"]) == 75
    assert new["exit_status"] == 0
    assert new["accuracy"][-1] > 0.9
    if dtype == "fp16":
        assert "loss scale already at minimum" in old["message"]
    else:
        assert old["exit_status"] == 0  # nothing tells the user
        assert old["accuracy"][-1] == old["accuracy"][0]
