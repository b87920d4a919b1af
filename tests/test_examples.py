# SPDX-License-Identifier: Apache-2.0
"""training_scripts/examples/: each runs as its docstring says, on the demo's data and model."""

import json
import subprocess
import sys

import pytest
import runs
from saved import save
from transformers import AutoTokenizer

EXAMPLES = runs.SCRIPTS / "examples"


def example(name, *flags):
    words = [sys.executable, str(EXAMPLES / name), *map(str, flags)]
    values = runs.environment()
    result = subprocess.run(words, cwd=runs.TOP, env=values, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def sweep(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    flags = ("--model", demo / "model", "--data", demo / "data", "--rates", "1e-9", "1e-3", "--output", folder)
    return folder, example("train_from_python.py", *flags)


@pytest.mark.slow
def test_train_from_python(sweep):
    folder, lines = sweep
    assert [line.split(":")[0] for line in lines] == ["learning rate 1e-09", "learning rate 0.001", "best"]
    assert lines[-1] == "best: 0.001"
    assert (folder / "0.001" / "model.safetensors").is_file()


@pytest.mark.slow
def test_score_texts(sweep, demo, tmp_path):
    folder = sweep[0] / "0.001"
    (prompt, chosen), *_ = runs.held_out(demo)[0]
    _, rejected = runs.held_out(demo)[1][0]
    rows = [{"prompt": prompt, "response": text, "id": i} for i, text in enumerate((chosen, rejected))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [json.loads(line) for line in example("score_texts.py", "--model", folder, "--rows", path)]
    assert [row["id"] for row in scored] == [0, 1]
    by_transformers = runs.reload_scores(folder, [(prompt, chosen), (prompt, rejected)]).tolist()
    assert [row["score"] for row in scored] == pytest.approx(by_transformers, abs=1e-5)


@pytest.mark.slow
def test_best_of_n(sweep, demo):
    flags = ("--policy", demo / "model", "--reward", sweep[0] / "0.001", "--prompt", "Human: How? Assistant:")
    lines = example("best_of_n.py", *flags, "--n", 3, "--max_new_tokens", 8)
    scores = [float(score) for score in lines[0].removeprefix("scores: ").split(", ")]
    assert len(scores) == 3
    assert lines[1].startswith(f"best ({max(scores):.3f}):")


CALLS_IT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("reward_func", sys.argv[1])  # as OpenRLHF reads it
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = [module.reward_func([query], [prompt], [None]) for query, prompt in json.loads(sys.argv[2])]
print(json.dumps([[each[name].item() for name in ("rewards", "scores")] for each in found]))
"""


def call_reward_func(calls, **variables):
    words = [sys.executable, "-c", CALLS_IT, str(EXAMPLES / "openrlhf_reward.py"), json.dumps(calls)]
    values = runs.environment(HF_HUB_OFFLINE="1", **variables)
    return subprocess.run(words, cwd=runs.TOP, env=values, capture_output=True, text=True, timeout=120)


def test_openrlhf_reward(tmp_path):
    folder = save(tmp_path)
    rows = [("how do I bake bread", " mix flour and water"), ("how do I bake bread", " go away")]
    end = AutoTokenizer.from_pretrained(folder).eos_token
    calls = [(prompt + response + end, prompt) for prompt, response in rows]
    done = call_reward_func(calls, REWARD_MODEL=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    by_transformers = runs.reload_scores(folder, rows).tolist()
    assert [rewards for rewards, _ in found] == pytest.approx(by_transformers, abs=1e-5)
    assert all(rewards == scores for rewards, scores in found)


@pytest.mark.slow
def test_openrlhf_reward_without_a_model_says_so():
    done = call_reward_func([("a", "a")], REWARD_MODEL=None)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("REWARD_MODEL has to name a folder that a run has saved")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train_from_python.py", ("--model", "./none", "--data", "x"), "--model_name_or_path ./none: no such folder"),
        ("best_of_n.py", ("--reward", "./none", "--prompt", "x", "--policy"), "error: none: no such folder"),
        ("score_texts.py", ("--rows",), "row 2: it needs a prompt and a response"),
    ],
)
def test_a_mistake_ends_in_a_line(name, flags, message, sweep, demo, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    last = {
        "best_of_n.py": [demo / "model"],
        "score_texts.py": [tmp_path / "rows.jsonl", "--model", sweep[0] / "0.001"],
    }
    words = [sys.executable, str(runs.SCRIPTS / "examples" / name), *map(str, (*flags, *last.get(name, [])))]
    values = runs.environment(HF_HUB_OFFLINE="1")
    result = subprocess.run(words, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
