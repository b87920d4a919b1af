# SPDX-License-Identifier: Apache-2.0
"""The flags against upstream's own main.py and launch scripts, in the checkout that DEEPSPEED_EXAMPLES names."""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
from flags import read

from reward_model.config.parser import run_parser

FOLDER = "applications/DeepSpeed-Chat/training/step2_reward_model_finetuning"
MODEL = "facebook/opt-350m"
SAMPLES = {"int": "1", "float": "0.5", "str": "text", "SchedulerType": "linear"}
VARIABLES = {"OUTPUT": "./output", "ZERO_STAGE": "2", "OFFLOAD": "--offload"}


@pytest.fixture(scope="module")
def step2():
    checkout = os.environ.get("DEEPSPEED_EXAMPLES")
    if not checkout:
        pytest.skip("DEEPSPEED_EXAMPLES is unset: name the folder of a DeepSpeedExamples checkout")
    folder = Path(checkout) / FOLDER
    if not (folder / "main.py").is_file():
        pytest.skip(f"DEEPSPEED_EXAMPLES: no {FOLDER}/main.py in {checkout}")
    return folder


@pytest.fixture(scope="module")
def flags(step2):
    """Upstream's flags, each with the keyword arguments of its add_argument call, as syntax."""
    calls = [node for node in ast.walk(ast.parse((step2 / "main.py").read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    found = {ast.literal_eval(call.args[0]): {k.arg: k.value for k in call.keywords} for call in calls}
    assert len(found) >= 30  # 33 in 2025
    return found


def sample(flag, keywords):
    """A flag's words on a command line, a value that upstream takes included."""
    if "action" in keywords:
        return [flag]
    if flag == "--zero_stage":
        return [flag, "2"]
    if "choices" in keywords:
        return [flag, ast.literal_eval(keywords["choices"])[0]]
    return [flag, SAMPLES[ast.unparse(keywords["type"]) if "type" in keywords else "str"]]


def launch_line(script):
    """The words after main.py in a launch script, its variables filled in; None where it launches nothing itself."""
    text = script.read_text().replace("\\\n", " ")
    found = re.search(r'(cmd=")?deepspeed [^\n]*?main\.py ([^\n]*)', text)
    if not found:
        return None
    line = found[2].split("&>")[0].strip()
    line = line.removesuffix('"') if found[1] else line
    return shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda name: VARIABLES[name[1]], line))


def test_every_flag_of_upstream_is_known(flags):
    ours = {name for action in run_parser()._actions for name in action.option_strings}
    assert flags.keys() - ours == set()


def test_every_flag_of_upstream_takes_what_it_took(flags):
    needs = {"--offload": ["--zero_stage", "2"]}  # upstream's stage 0 offloads nothing either
    for flag, keywords in flags.items():
        words = [*sample(flag, keywords), *needs.get(flag, [])]
        assert flag[2:] in read(["--model_name_or_path", MODEL, *words]).explicit


def test_flags_that_take_a_value_do_so_in_both(flags):
    ours = {name: action for action in run_parser()._actions for name in action.option_strings}
    differ = [flag for flag, keywords in flags.items() if ("action" in keywords) != (ours[flag].nargs == "?")]
    assert differ == []


def test_every_choice_of_upstream_is_one_here(flags):
    choices = {flag: ast.literal_eval(k["choices"]) for flag, k in flags.items() if "choices" in k}
    assert choices.keys() >= {"--dtype", "--lr_scheduler_type"}
    for flag, values in choices.items():
        for value in values:
            assert getattr(read(["--model_name_or_path", MODEL, flag, value]), flag[2:]) == value


def test_every_launch_line_of_upstream_parses(step2):
    lines = {script: launch_line(script) for script in sorted((step2 / "training_scripts").rglob("*.sh"))}
    lines = {script: line for script, line in lines.items() if line}
    assert len(lines) >= 5  # 6 in 2025
    for script, line in lines.items():
        parsed = read(["--local_rank=0", *line])
        assert parsed.output_dir == "./output", script
        assert parsed.explicit == {word[2:] for word in line if word.startswith("--")} | {"local_rank"}, script
