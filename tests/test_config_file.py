# SPDX-License-Identifier: Apache-2.0
"""``--config``: YAML and JSON, flags that win over it, and the run.json of an earlier run."""

import json

import pytest
from flags import read

from reward_model.common.errors import UserError
from reward_model.config.options import RunConfig, parse
from reward_model.config.parser import read_words, run_parser
from reward_model.config.settings import resolve

YAML = """\
# as a user writes it
model_name_or_path: facebook/opt-350m
data_path: [a.jsonl, "b c.jsonl"]
learning_rate: 1e-5        # YAML reads this as text
offload: true
zero_stage: 2
gradient_checkpointing: false
prior_beta: [10, -9]
loss: prior_length
output_dir: null
margin:
"""

# what version 0.1.0 wrote: every flag as it was resolved, and nothing of what was given
OLD = {
    "model_name_or_path": "m", "data_path": ["d"], "eval_data_path": [], "loss": ["logistic"], "loss_weight": [1.0],
    "margin": 0.0, "label_smoothing": 0.0, "dtype": "fp32", "zero_stage": 2, "offload": False, "local_rank": 0,
    "deepspeed": True, "seed": 1234, "max_grad_norm": 0, "output_dir": "out", "focal_gamma": 2.0,
    "prior_beta": [20.0, -15.0], "pooling": "own", "score_penalty": "centre", "score_penalty_weight": 0.01,
    "versions": {"reward_model": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write_file


def message(*words):
    with pytest.raises(UserError) as caught:
        parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_says_what_flags_say(write):
    found = read(["--config", write(YAML)])
    assert (found.data_path, found.learning_rate, found.offload) == (["a.jsonl", "b c.jsonl"], 1e-5, True)
    assert (found.prior_beta, found.loss, found.output_dir) == ([10.0, -9.0], ["prior_length"], None)
    assert found.gradient_checkpointing is False
    given = {"model_name_or_path", "data_path", "learning_rate", "offload", "zero_stage", "prior_beta", "loss"}
    assert found.explicit == given | {"gradient_checkpointing"}


def test_flags_win_wherever_they_stand(write):
    path = write(YAML)
    for words in (["--config", path, "--zero_stage", "3"], ["--zero_stage=3", f"--config={path}"]):
        assert (read(words).zero_stage, read(words).learning_rate) == (3, 1e-5)
    assert read(["--config", path, "--offload=false"]).offload is False
    assert read(["--config", path, "--data_path", "c"]).data_path == ["c"]


def test_a_list_that_is_given_twice_is_said_and_one_that_a_file_has_too_is_not(write, caplog):
    path = write(YAML)
    assert read(["--config", path, "--data-path=c"]).data_path == ["c"]
    assert read(["--config", path, "--seed", "1", "--seed=1"]).seed == 1
    assert not caplog.messages
    found = read(["--config", path, "--data_path", "c", "d", "--seed=1", "--data-path=e", "--seed", "2"])
    assert (found.data_path, found.seed) == (["e"], 2)
    ending = "is given 2 times: what follows the last is taken, and no more"
    assert caplog.messages == [f"--data_path {ending}"]  # a flag of one value may be a recipe's
    read_words(run_parser(), ["--model_name_or_path=m", "--seed=1", "--seed", "2"])  # as other commands do
    assert caplog.messages[1:] == [f"--seed {ending}"]


def test_json_is_read_too(write):
    path = write({"model_name_or_path": "m", "learning_rate": 1e-5, "loss_weight": [2]}, "run.json")
    found = read(["--config", path])
    assert (found.learning_rate, found.loss_weight) == (1e-5, [2.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1", ["learning_rte", "did you mean learning_rate?"]),
        ("nothing_like_it: 1", ["no option nothing_like_it"]),
        ("learning_rate: fast", ["--learning_rate", "fast"]),
        ("learning_rate: 0", ["--learning_rate", "not above 0"]),
        ("zero_stage: 5", ["--zero_stage", "5"]),
        ("offload: perhaps", ["--offload", "perhaps"]),
        ("data:\n  data_path: a", ["no option data"]),
        ("margin: {a: 1}", ["margin is nested"]),
        ("data_path: [[a]]", ["data_path is nested"]),
        ("- a\n- b", ["has no keys"]),
        ("", ["has no keys"]),
        ("a: [", ["neither YAML nor JSON"]),
        ("config: other.yaml", ["no option config"]),
        ("seed: 1\nseed: 2", ["line 2", "seed", "twice"]),
        ('{"seed": 1,\n"seed": 2}', ["line 2", "seed", "twice"]),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(write, text, words):
    path = write(text)
    said = message("--model_name_or_path", "m", "--config", path)
    assert [word for word in [path, *words] if word not in said] == []


def test_a_file_that_is_not_there(tmp_path):
    assert "No such file" in message("--config", str(tmp_path / "none.yaml"))
    assert "--config" in message("--config")


def test_a_contradiction_between_file_and_flag_is_found(write):
    assert "stage 0 offloads nothing" in message("--config", write(YAML), "--zero_stage", "0")


def test_run_json_gives_the_same_run_back(write):
    words = "--model_name_or_path m --data_path a b --loss focal --focal_gamma 2 --seed 1234 --lora_dim 4"
    first = parse([*words.split(), "--local_rank=1"])
    text = resolve(first, "bf16", 2, 64, 100).to_json({"torch": "2"})
    again = parse(["--config", write(text, "run.json")])
    assert again.values() == first.values() | {"local_rank": -1}
    assert again.given == first.given - {"local_rank"}
    assert json.loads(text)["dtype"] == "bf16"  # as it was resolved, and to be resolved anew
    assert again.engine.dtype == "auto"


def test_run_json_has_what_the_deepspeed_file_decided(write):
    file = write({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}, "ds.json")
    config = parse(["--model_name_or_path", "m", "--deepspeed_config", file])
    values = json.loads(resolve(config, "fp32", 1, 64, 100).to_json({}))
    assert (values["zero_stage"], values["gradient_accumulation_steps"]) == (2, 4)
    assert values["given"] == ["deepspeed_config", "model_name_or_path"]


def test_run_json_of_version_0_1_0(write):
    config = parse(["--config", write(OLD, "run.json")])
    changed = {"model_name_or_path", "data_path", "dtype", "zero_stage", "max_grad_norm", "output_dir", "pooling"}
    assert config.given == changed | {"score_penalty"}
    assert (config.engine.zero_stage, config.training.max_grad_norm) == (2, 0.0)
    assert (config.model.pooling, config.loss.score_penalty) == ("classifier", "center")


def test_python_names_are_those_of_the_flags():
    config = RunConfig.of(
        model_name_or_path="m", data_path="d", learning_rate=1e-5, offload=True, zero_stage=1, margin=0.5
    )
    assert (config.training.learning_rate, config.engine.offload, config.loss.margin) == (1e-5, True, "0.5")
    assert config.data.data_path == ["d"]
    with pytest.raises(UserError, match="no option learning_rte; did you mean learning_rate"):
        RunConfig.of(model_name_or_path="m", learning_rte=1)
    with pytest.raises(UserError, match="--learning_rate"):
        RunConfig.of(model_name_or_path="m", learning_rate="fast")
    with pytest.raises(UserError, match="--model_name_or_path"):
        RunConfig.of()


def test_a_file_from_python(write):
    config = RunConfig.of(config=write(YAML), zero_stage=3)
    assert (config.training.learning_rate, config.engine.zero_stage) == (1e-5, 3)
    with pytest.raises(UserError) as caught:
        RunConfig.of(model_name_or_path="m", learning_rate="fast")
    assert "--help" not in str(caught.value)
