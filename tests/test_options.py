# SPDX-License-Identifier: Apache-2.0
"""The flags: upstream's all known, launch lines unchanged, one clear line for what is wrong."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from flags import read

from reward_model.common.errors import UserError
from reward_model.config.groups import Scheduler
from reward_model.config.objectives import LOSSES
from reward_model.config.options import explain_inherited, parse
from reward_model.config.parser import run_parser

MODEL = ["--model_name_or_path", "facebook/opt-350m"]

# every flag of upstream's step 2 main.py with a value, and what it is read as
UPSTREAM = [
    ("--data_path Dahoas/rm-static Dahoas/full-hh-rlhf", "data_path", ["Dahoas/rm-static", "Dahoas/full-hh-rlhf"]),
    ("--data_split 2,4,4", "data_split", "2,4,4"),
    ("--data_output_path /tmp/data_files/", "data_output_path", "/tmp/data_files/"),
    ("--model_name_or_path facebook/opt-1.3b", "model_name_or_path", "facebook/opt-1.3b"),
    ("--num_padding_at_beginning 1", "num_padding_at_beginning", 1),
    ("--per_device_train_batch_size 4", "per_device_train_batch_size", 4),
    ("--per_device_eval_batch_size 8", "per_device_eval_batch_size", 8),
    ("--max_seq_len 1024", "max_seq_len", 1024),
    ("--learning_rate 9.65e-6", "learning_rate", 9.65e-6),
    ("--weight_decay 0.1", "weight_decay", 0.1),
    ("--num_train_epochs 2", "num_train_epochs", 2),
    ("--gradient_accumulation_steps 4", "gradient_accumulation_steps", 4),
    ("--lr_scheduler_type linear", "lr_scheduler_type", "linear"),
    ("--num_warmup_steps 100", "num_warmup_steps", 100),
    ("--output_dir ./output", "output_dir", "./output"),
    ("--seed 42", "seed", 42),
    ("--local_rank 3", "local_rank", 3),
    ("--gradient_checkpointing", "gradient_checkpointing", True),
    ("--dropout 0.0", "dropout", 0.0),
    ("--offload --zero_stage 2", "offload", True),
    ("--dtype fp16", "dtype", "fp16"),
    ("--dtype bf16", "dtype", "bf16"),
    ("--zero_stage 3", "zero_stage", 3),
    ("--lora_dim 128", "lora_dim", 128),
    ("--lora_module_name decoder.layers.", "lora_module_name", "decoder.layers."),
    ("--only_optimize_lora", "only_optimize_lora", True),
    ("--lora_learning_rate 5e-4", "lora_learning_rate", 5e-4),
    ("--eval_interval 50", "eval_interval", 50),
    ("--eval_iters 100", "eval_iters", 100),
    ("--compute_fp32_loss", "compute_fp32_loss", True),
    ("--enable_tensorboard", "enable_tensorboard", True),
    ("--tensorboard_path ./logs", "tensorboard_path", "./logs"),
    ("--add_eot_token", "add_eot_token", True),
    # deepspeed.add_config_arguments
    ("--deepspeed", "deepspeed", True),
    ("--deepspeed_config ds.json", "deepspeed_config", "ds.json"),
]

FOUR_SETS = (
    "Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets"
)
OPT = (
    f"--data_path {FOUR_SETS} --data_split 2,4,4 --model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 "
    "--per_device_train_batch_size {batch} --per_device_eval_batch_size {batch} --max_seq_len 512 --learning_rate 5e-5 "
    "--weight_decay 0.1 --dropout 0.0 --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine "
    "--num_warmup_steps 0 --seed 1234 --zero_stage {stage} --deepspeed --output_dir ./output"
)
LLAMA = (
    "--data_path Dahoas/rm-static --data_split 2,4,4 --model_name_or_path meta-llama/Llama-2-7b-hf "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 "
    "--weight_decay 0.1 --num_padding_at_beginning 0 --num_train_epochs 1 --gradient_accumulation_steps 1 "
    "--lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --gradient_checkpointing --zero_stage 3 --deepspeed "
    "--offload {lora} --output_dir ./output_step2_llama_7b_epoch1_lr9.65e-6"
)
LAUNCH_LINES = {
    "opt/single_gpu/run_350m.sh": "--model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 "
    "--weight_decay 0.1 --dropout 0.0 --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard "
    "--tensorboard_path ./output --deepspeed --output_dir ./output",
    "opt/single_node/run_350m.sh": OPT.format(batch=4, stage=0),
    "opt/multi_node/run_350m.sh": OPT.format(batch=2, stage=0),
    "opt/single_node/sweep/run_single.sh": OPT.format(batch=4, stage=2) + " --offload",
    "llama2/run_llama2_7b.sh": LLAMA.format(lora=""),
    "llama2/run_llama2_7b_lora.sh": LLAMA.format(lora='--lora_dim 128 --lora_module_name "layers."'),
}

WRONG = [
    ("--zero_stage 5", ["--zero_stage", "5"]),
    ("--zero_stage two", ["--zero_stage", "two"]),
    ("--dtype fp8", ["--dtype", "fp8"]),
    ("--lr_scheduler_type step", ["--lr_scheduler_type"]),
    ("--max_seq_len 0", ["--max_seq_len", "0"]),
    ("--per_device_train_batch_size 0", ["--per_device_train_batch_size"]),
    ("--per_device_eval_batch_size -4", ["--per_device_eval_batch_size"]),
    ("--gradient_accumulation_steps 1.5", ["--gradient_accumulation_steps"]),
    ("--num_train_epochs 0", ["--num_train_epochs"]),
    ("--num_warmup_steps -1", ["--num_warmup_steps"]),
    ("--eval_iters -1", ["--eval_iters"]),
    ("--lora_dim -1", ["--lora_dim"]),
    ("--lora_alpha 0 --lora_dim 8", ["--lora_alpha"]),
    ("--lora_dropout 1 --lora_dim 8", ["--lora_dropout", "1"]),
    ("--lora_bits 3 --lora_dim 8", ["--lora_bits", "3"]),
    ("--optim sgd", ["--optim", "sgd", "adamw_torch_fused"]),
    ("--flip_share 1", ["--flip_share", "1"]),
    ("--drop_share -0.1", ["--drop_share", "-0.1"]),
    ("--lora_dropout -0.1 --lora_dim 8", ["--lora_dropout", "-0.1"]),
    ("--learning_rate 0", ["--learning_rate", "0"]),
    ("--learning_rate inf", ["--learning_rate", "inf"]),
    ("--learning_rate fast", ["--learning_rate", "fast"]),
    ("--weight_decay nan", ["--weight_decay"]),
    ("--weight_decay -0.1", ["--weight_decay", "-0.1"]),
    ("--max_grad_norm -1", ["--max_grad_norm", "-1"]),
    ("--max_bad_steps 0", ["--max_bad_steps", "below 1"]),
    ("--score_limit -1", ["--score_limit"]),
    ("--seed -1", ["--seed"]),
    ("--seed 4294967296", ["--seed", "4294967296"]),
    ("--dropout 1.5", ["--dropout", "1.5"]),
    ("--label_smoothing 0.6", ["--label_smoothing", "0.6"]),
    ("--label_smoothing -0.1", ["--label_smoothing", "-0.1"]),
    ("--label_smoothing half", ["--label_smoothing", "half", "column or strength"]),
    ("--label_smoothing nan", ["--label_smoothing", "nan"]),
    ("--margin wide", ["--margin", "wide", "column", "small", "large or strength"]),
    ("--margin nan", ["--margin", "nan"]),
    ("--loss square", ["--loss", "square", "logistic", "rank_list", "mse", "bradley_terry"]),
    ("--loss", ["--loss"]),
    ("--loss_weight 0", ["--loss_weight", "0"]),
    ("--loss_weight nan", ["--loss_weight", "nan"]),
    ("--loss focal --focal_gamma -1", ["--focal_gamma", "-1"]),
    ("--loss huber --huber_delta 0", ["--huber_delta", "0"]),
    ("--loss prior_length --prior_beta 20", ["--prior_beta"]),
    ("--loss prior_length --prior_beta 20 low", ["--prior_beta", "low"]),
    ("--length_penalty -1", ["--length_penalty", "-1"]),
    ("--score_penalty fine", ["--score_penalty", "fine"]),
    ("--loss_level word", ["--loss_level", "word"]),
    ("--pooling max", ["--pooling", "max"]),
    ("--save_format zip", ["--save_format", "zip"]),
    ("--on_bad_row ignore", ["--on_bad_row", "ignore"]),
    ("--data_path", ["--data_path"]),
    ("--local_rank first", ["local_rank", "first"]),
    ("--learning_rte 1e-5", ["--learning_rte"]),
    ("--learn 1e-5", ["--learn"]),
    ("1e-5", ["1e-5"]),
]

CONTRADICTIONS = [
    ("--offload_activations", ["--offload_activations", "--gradient_checkpointing"]),
    ("--gradient_checkpointing --offload_activations --compile", ["--compile", "--offload_activations", "one out"]),
    ("--offload --zero_stage 0", ["--offload", "--zero_stage"]),
    ("--loss_level token --pooling mean", ["--loss_level", "--pooling", "mean"]),
    ("--score_penalty_weight 0.1", ["--score_penalty_weight", "--score_penalty:"]),
    ("--lora_alpha 16", ["--lora_alpha", "--lora_dim"]),
    ("--lora_dropout 0.1", ["--lora_dropout", "--lora_dim"]),
    ("--lora_bits 4", ["--lora_bits", "--lora_dim"]),
    ("--lora_bits 4 --lora_dim 8 --zero_stage 3", ["--lora_bits 4", "ZeRO stage 3", "--zero_stage 2"]),
    ("--optim adamw_8bit --offload --zero_stage 2", ["--optim adamw_8bit", "offload"]),
    ("--normalize_scores train", ["--normalize_scores", "--output_dir"]),
    ("--loss logistic focal", ["--loss logistic focal", "one loss at most"]),
    ("--loss logistic pairwise", ["--loss logistic logistic", "one loss at most"]),  # two names of one loss
    ("--loss rank_list mse best_of_k", ["--loss rank_list mse best_of_k", "one loss at most"]),
    ("--loss mse ordinal", ["--loss mse ordinal", "one loss at most"]),
    ("--loss logistic mse --loss_weight 1", ["--loss_weight: 1 numbers for 2 losses"]),
    ("--loss_weight 1 2", ["--loss_weight: 2 numbers for 1 losses"]),
    ("--loss focal --margin 1", ["--margin", "logistic, scaled, hinge", "focal"]),
    ("--loss focal --margin 0", ["--margin", "focal"]),  # the default, but it was asked for
    ("--loss plackett_luce mse --margin column", ["--margin", "plackett_luce mse"]),
    ("--loss scaled", ["--loss scaled", "--margin column, small or large"]),
    ("--loss mse --flip_share 0.1", ["--flip_share", "losses of pairs", "mse"]),
    ("--loss logistic rank_list --drop_share 0.1", ["--drop_share", "losses of pairs", "rank_list"]),
    ("--flip_share 0.1 --margin column", ["--flip_share", "--margin column", "--margin strength"]),
    ("--flip_share 0.1 --label_smoothing column", ["--flip_share", "--label_smoothing column", "strength"]),
    ("--flip_share 0.5 --drop_share 0.5", ["--flip_share 0.5", "--drop_share 0.5", "no pair"]),
    ("--loss scaled --margin strength", ["--loss scaled", "--margin strength", "negative"]),
    ("--loss scaled --margin 2", ["--loss scaled", "--margin column, small or large"]),
    ("--loss hinge --label_smoothing 0.1", ["--label_smoothing", "logistic", "hinge"]),
    ("--loss mse --label_smoothing column", ["--label_smoothing", "logistic", "mse"]),
    ("--focal_gamma 2", ["--focal_gamma", "--loss focal", "logistic"]),
    ("--loss mse --huber_delta 1", ["--huber_delta", "--loss huber", "mse"]),
    ("--prior_beta 20 -15", ["--prior_beta", "--loss prior_length or prior_cosine", "logistic"]),
    ("--loss prior_length --prior_model x", ["--prior_model", "--loss prior_cosine", "prior_length"]),
    ("--loss prior_cosine", ["--loss prior_cosine", "--prior_model"]),
    ("--loss prior_length --prior_beta 20 -20", ["--prior_beta 20 -20", "more than 0"]),  # 20/1.001 - 20 = -0.02
    ("--loss prior_length --prior_beta 0 1", ["--prior_beta 0 1", "more than 0"]),
    ("--loss prior_length --prior_beta -1 15", ["--prior_beta -1 15", "more than 0"]),
    ("--loss_level token --loss rank_list", ["--loss_level token", "--loss rank_list"]),
    ("--loss_level token --loss logistic mse", ["--loss_level token", "--loss logistic mse"]),
]

INHERITED = [
    ("--num_padding_at_beginning 1", "num_padding_at_beginning"),
    ("--compute_fp32_loss", "compute_fp32_loss"),
    ("--only_optimize_lora", "only_optimize_lora"),
    ("--only_optimize_lora --lora_dim 8", "only_optimize_lora"),
    ("--lora_module_name layers.", "lora_module_name"),
    ("--deepspeed", "deepspeed"),
]


def options(line=""):
    return read(MODEL + shlex.split(line))


def message(line):
    with pytest.raises(UserError) as caught:
        options(line)
    return str(caught.value)


@pytest.mark.parametrize(("line", "name", "value"), UPSTREAM, ids=[line for line, _, _ in UPSTREAM])
def test_every_flag_of_upstream_is_known(line, name, value):
    assert getattr(options(line), name) == value


@pytest.mark.parametrize("line", LAUNCH_LINES.values(), ids=LAUNCH_LINES)
@pytest.mark.parametrize("rank", ["--local_rank=1", "--local-rank=1"])
def test_launch_lines_of_upstream_parse_unchanged(line, rank):
    words = shlex.split(line)
    parsed = read([rank, *words])
    assert parsed.local_rank == 1
    assert parsed.explicit == {word[2:] for word in words if word.startswith("--")} | {"local_rank"}


def test_a_launch_line_is_read_as_it_says():
    parsed = read(shlex.split(LAUNCH_LINES["llama2/run_llama2_7b_lora.sh"]))
    assert (parsed.zero_stage, parsed.offload, parsed.lora_dim, parsed.lora_module_name) == (3, True, 128, "layers.")
    assert (parsed.data_path, parsed.data_split, parsed.learning_rate) == (["Dahoas/rm-static"], "2,4,4", 9.65e-6)


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_schedule_is_one_of_transformers(name):
    from transformers import SchedulerType

    assert options(f"--lr_scheduler_type {name}").lr_scheduler_type == SchedulerType(name)


def test_defaults_are_upstreams_where_they_do_not_surprise():
    parsed = options()
    same = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "max_seq_len": 512, "seed": 1234}
    same |= {"learning_rate": 5e-5, "weight_decay": 0.0, "num_train_epochs": 1, "gradient_accumulation_steps": 1}
    same |= {"lr_scheduler_type": "cosine", "num_warmup_steps": 0, "zero_stage": 0, "offload": False, "lora_dim": 0}
    same |= {"lora_learning_rate": 5e-4, "dropout": None, "output_dir": None, "local_rank": -1, "eval_interval": 0}
    ours = {"data_split": None, "dtype": "auto", "eval_iters": 0, "margin": 0.0, "score_penalty": None}
    ours |= {
        "data_path": [],
        "tensorboard_path": None,
        "loss": ["logistic"],
        "loss_weight": [1.0],
        "label_smoothing": 0.0,
        "length_penalty": 0.0,
    }
    assert {name: getattr(parsed, name) for name in same | ours} == same | ours


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_value_is_one_line_that_names_the_flag(line, words):
    text = message(line)
    assert "\n" not in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(("line", "words"), CONTRADICTIONS, ids=[line for line, _ in CONTRADICTIONS])
def test_a_contradiction_is_one_line_that_names_both_flags(line, words):
    text = message(line)
    assert "\n" not in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [("--learning_rate 0", "above 0"), ("--max_seq_len 0", "below 1"), ("--seed -1", "below 0"), ("--dropout 1", "1)")],
)
def test_a_number_out_of_range_says_which_range(line, reason):
    assert reason in message(line)


def test_the_model_is_required():
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse([])


def test_offload_without_a_stage_is_left_to_the_file_where_there_is_one():
    assert options("--offload --deepspeed_config ds.json").offload


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--margin 1.5", 1.5),
        ("--margin=-1", -1.0),
        ("--margin column", "column"),
        ("--margin strength", "strength"),
        ("--margin small", "small"),
        ("--loss scaled --margin large", "large"),
        ("--loss hinge", 1.0),  # at 0 equal scores would satisfy it
        ("--loss hinge mse", 1.0),
        ("--loss hinge --margin 0", 0.0),
        ("--loss logistic mse --margin 2", 2.0),
        ("--loss focal", 0.0),
    ],
)
def test_margin_is_a_number_or_of_the_data(line, value):
    assert options(line).margin == value


@pytest.mark.parametrize(
    ("line", "names", "weights"),
    [
        ("", ["logistic"], [1.0]),
        ("--loss pairwise", ["logistic"], [1.0]),
        ("--loss log_exp", ["logistic"], [1.0]),
        ("--loss mse bradley_terry", ["mse", "logistic"], [1.0, 1.0]),
        ("--loss logistic plackett_luce bce --loss_weight 1 0.5 2", ["logistic", "plackett_luce", "bce"], [1, 0.5, 2]),
    ],
)
def test_losses_and_their_weights(line, names, weights):
    assert (options(line).loss, options(line).loss_weight) == (names, weights)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_named_alone(name):
    needs = {"scaled": "--margin column", "prior_cosine": "--prior_model encoder"}
    assert options(f"--loss {name} {needs.get(name, '')}").loss == [name]


@pytest.mark.parametrize(("value", "read"), [("0", 0.0), ("0.5", 0.5), ("column", "column"), ("strength", "strength")])
def test_label_smoothing_is_a_number_or_the_column(value, read):
    assert options(f"--label_smoothing {value}").label_smoothing == read
    assert options(f"--loss mse pairwise --label_smoothing {value}").label_smoothing == read


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--loss focal --focal_gamma 0", "focal_gamma", 0.0),
        ("--loss huber logistic --huber_delta 2", "huber_delta", 2.0),
        ("--loss prior_length --prior_beta 10 -9", "prior_beta", [10.0, -9.0]),
        ("--loss prior_cosine --prior_model encoder --prior_beta 1 0", "prior_beta", [1.0, 0.0]),
        ("--normalize_scores eval --output_dir out", "normalize_scores", "eval"),
        ("--loss focal --loss_level token", "loss_level", "token"),
    ],
)
def test_a_flag_of_one_loss_goes_with_it(line, name, value):
    assert getattr(options(line), name) == value


@pytest.mark.parametrize(
    ("line", "explicit"),
    [
        ("", set()),
        ("--seed 1234", {"seed"}),
        ("--seed=1234", {"seed"}),
        ("--deepspeed", {"deepspeed"}),
        ("--output_dir=--debug", {"output_dir"}),
        ("--local-rank=0", {"local_rank"}),
        ("--data_path a b --dropout 0", {"data_path", "dropout"}),
        ("--lora_module_name seed", {"lora_module_name"}),
    ],
)
def test_explicit_holds_what_was_given(line, explicit):
    assert options(line).explicit == explicit | {"model_name_or_path"}


def test_the_command_line_is_read_where_no_list_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", *MODEL, "--seed=7"])
    parsed = parse()
    assert parsed.training.seed == 7
    assert parsed.given == {"model_name_or_path", "seed"}


@pytest.mark.parametrize(("line", "name"), INHERITED, ids=[line for line, _ in INHERITED])
def test_an_inherited_flag_says_that_it_changes_nothing(line, name, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    explain_inherited(parse(MODEL + shlex.split(line)))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"--{name} changes nothing")


@pytest.mark.parametrize(
    "line", ["", "--lora_dim 8 --lora_module_name layers.", "--num_padding_at_beginning=0 --seed 1"]
)
def test_only_flags_that_were_given_and_change_nothing_are_explained(line, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    explain_inherited(parse(MODEL + shlex.split(line)))
    assert [text.split()[0] for text in caplog.messages] == (
        ["--num_padding_at_beginning"] if "padding" in line else []
    )


def test_only_the_first_rank_explains(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    explain_inherited(parse([*MODEL, "--deepspeed"]))
    assert caplog.text == ""


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = capsys.readouterr().out
    flags = [flag for action in run_parser()._actions for flag in action.option_strings[:1]]
    assert caught.value.code == 0
    assert [flag for flag in flags if flag not in text] == []


def test_the_cache_is_the_users_own_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert parse(MODEL).data.cache_folder == tmp_path / "dschat-reward"
    assert parse([*MODEL, f"--data_output_path={tmp_path}/rows"]).data.cache_folder == tmp_path / "rows"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse(MODEL).data.cache_folder == tmp_path / "home" / ".cache" / "dschat-reward"


def test_a_wrong_flag_is_told_before_anything_heavy_is_imported():
    heavy = {"datasets", "deepspeed", "peft", "reward_model.training"}
    code = f"import sys, reward_model.config.options as o; o.parse({MODEL}); print({heavy} & {{*sys.modules}})"
    top = Path(__file__).resolve().parent.parent
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, cwd=top, capture_output=True, text=True, check=True).stdout == "set()\n"
