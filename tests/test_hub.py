# SPDX-License-Identifier: Apache-2.0
"""--push_to_hub, against a hub on loopback."""

import hub_server
import pytest
import runs

from reward_model.common.errors import UserError
from reward_model.config.options import RunConfig, parse
from reward_model.config.settings import resolve
from reward_model.training.hub import hindrance, push, why_not

TOKEN, READER, FINE = "secret-token-that-writes", "secret-token-that-reads", "secret-token-for-one"
ORGS = [{"name": "mine", "roleInOrg": "write"}, {"name": "theirs", "roleInOrg": "read"}]
ME = {"type": "user", "name": "me", "orgs": ORGS}
ONLY_READS = {"scoped": [{"permissions": ["repo.read"]}]}
TOKENS = {
    TOKEN: ME | hub_server.WRITES,
    READER: ME | {"auth": {"accessToken": {"role": "read"}}},
    FINE: ME | {"auth": {"accessToken": {"role": "fineGrained", "fineGrained": ONLY_READS}}},
}


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with hub_server.running(TOKENS) as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield found


def output(**values):
    return RunConfig.of(model_name_or_path="m", output_dir="out", push_to_hub=True, **values).output


# --- whether it may go there ---


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hub_token": TOKEN}, ""),
        ({"hub_token": TOKEN, "hub_model_id": "mine/model"}, ""),
        ({"hub_token": READER}, "the token may only read"),
        ({"hub_token": FINE}, "the token may only read"),
        ({"hub_token": "secret-token-of-nobody"}, "the hub does not take the token"),
        ({"hub_token": TOKEN, "hub_model_id": "others/model"}, "the token is of me, who is not in others"),
        ({"hub_token": TOKEN, "hub_model_id": "theirs/model"}, "me may only read in theirs"),
        ({"hub_token": TOKEN, "hub_model_id": "a/b/c"}, "--hub_model_id a/b/c: "),
        ({"hub_token": TOKEN, "hub_model_id": "what is this"}, "--hub_model_id what is this: "),
    ],
)
def test_what_a_token_may_not_do_is_said_before_the_run(hub, values, said):
    found = why_not(output(**values))
    assert (said in found) if said else (found == "")
    assert "\n" not in found
    assert "secret-token" not in found


def test_without_a_token_and_without_a_hub(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert "there is no token; give --hub_token" in why_not(output())
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{runs.free_port()}")
    assert "--push_to_hub: the hub does not answer: " in why_not(output(hub_token=TOKEN))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = "--push_to_hub and HF_HUB_OFFLINE in the environment: take one of them away"
    assert why_not(output(hub_token=TOKEN)) == said


def test_only_a_run_that_goes_on_may_lack_the_hub(tmp_path, capsys):
    """HF_HUB_OFFLINE is set for all tests."""
    asked = RunConfig.of(model_name_or_path="m", output_dir=str(tmp_path), push_to_hub=True).output
    assert hindrance(asked) == why_not(asked) != ""
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert hindrance(asked) == ""
    assert f"{why_not(asked)}; it is tried at the end of the run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"push_to_hub": True}, "--push_to_hub without --output_dir"),
        ({"hub_model_id": "me/model", "output_dir": "out"}, "without --push_to_hub"),
        ({"hub_private_repo": True, "output_dir": "out"}, "without --push_to_hub"),
    ],
)
def test_contradictions(values, said):
    with pytest.raises(UserError, match=said):
        RunConfig.of(model_name_or_path="m", **values)


# --- the token ---


def test_the_token_is_nowhere_but_in_the_configuration(tmp_path):
    config = RunConfig.of(model_name_or_path="m", output_dir="out", push_to_hub=True, hub_token=TOKEN)
    assert config.output.hub_token == TOKEN
    assert TOKEN not in repr(config)
    settings = resolve(config, "fp32", 1, 64, 100)
    assert TOKEN not in settings.to_json({})
    assert '"push_to_hub": true' in settings.to_json({})
    (tmp_path / "run.yaml").write_text(f"hub_token: {TOKEN}\nmodel_name_or_path: m\n")
    with pytest.raises(UserError, match="a file is no place for hub_token") as caught:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert TOKEN not in str(caught.value)


# --- the way there ---

SAVED = ["adapter", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
BESIDE = ["README.md"]
STAYS = [
    *(".lock", "checkpoints/step-00000001/state.json", "finished.json", "metrics.jsonl", "run.json"),
    *("report.html", "evaluation.json"),  # which have texts of the data
]


@pytest.fixture
def folder(tmp_path):
    for name in (*SAVED[1:], "adapter/adapter_model.safetensors", *BESIDE, *STAYS, "wandb/run/x", "csv/train_loss.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def test_the_model_and_its_card_are_sent_and_nothing_else(hub, folder, capsys):
    push(folder, SAVED, output(hub_token=TOKEN, hub_model_id="mine/model", hub_private_repo=True), "owner/base")
    sent = {*SAVED[1:], "adapter/adapter_model.safetensors", *BESIDE}
    assert {name: content.decode() for name, content in hub.files.items()} == {
        name: f"content of {name}" for name in sent
    }
    assert [(repo["organization"], repo["name"]) for repo in hub.repos] == [("mine", "model")]
    assert hub.repos[0].get("private") or hub.repos[0].get("visibility") == "private"
    assert hub.strange == []
    said = capsys.readouterr().out
    assert f"pushed:  {hub.endpoint}/mine/model" in said
    assert TOKEN not in said


def test_the_repository_has_the_folder_s_name_unless_it_is_told(hub, folder):
    values = {"output_dir": str(folder), "push_to_hub": True, "hub_token": TOKEN}
    push(folder, SAVED, RunConfig.of(model_name_or_path="m", **values).output, str(folder))
    assert [repo["name"] for repo in hub.repos] == [folder.name]
    assert not hub.repos[0].get("private")
    assert set(hub.files) == {*SAVED[1:], *BESIDE}  # its adapter names a folder of this machine


def test_a_push_that_fails_is_one_line_with_the_command(hub, folder, capsys):
    hub.refuses = 507
    push(folder, SAVED, output(hub_token=TOKEN, hub_model_id="me/model"), "owner/base")
    said = capsys.readouterr().out
    (line,) = said.splitlines()
    assert line.startswith("not pushed to me/model: ")
    assert f"by hand: hf upload me/model {folder} . --include 'adapter/*' --include chat_template.jinja" in line
    assert line.endswith("--include README.md") and "report" not in line
    assert TOKEN not in said
    assert hub.files == {}


def test_the_command_for_doing_it_by_hand_is_one_that_hf_takes(hub, folder, monkeypatch):
    """By huggingface_hub's own program, in a process that has the token in its environment."""
    import shlex
    import shutil
    import subprocess

    if not shutil.which("hf"):
        pytest.skip("huggingface_hub's program hf is not here")
    hub.refuses = 507
    said = []
    monkeypatch.setattr("reward_model.training.hub.logger.warning", said.append)
    push(folder, SAVED, output(hub_token=TOKEN, hub_model_id="me/model"), "owner/base")
    hub.refuses = 0
    words = shlex.split(said[0].partition("by hand: ")[2])
    values = runs.environment(HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HUB_OFFLINE=None, HF_HUB_DISABLE_XET="1")
    done = subprocess.run(words, env=values, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(hub.files) == {*SAVED[1:], "adapter/adapter_model.safetensors", *BESIDE}


@pytest.mark.slow
def test_a_run_pushes_what_it_has_saved(demo, tmp_path):
    with hub_server.running(TOKENS) as hub:
        values = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        flags = ["--push_to_hub", "--hub_model_id", "me/model", "--hub_token", TOKEN, "--max_steps", 2]
        metrics = runs.train(demo, tmp_path / "out", *flags, environment=values)
        assert f"pushed:  {hub.endpoint}/me/model" in metrics.output
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
        assert not {"run.json", "metrics.jsonl", "finished.json", ".lock"} & set(hub.files)
        assert hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
        text = b"".join(hub.files.values())
        assert str(tmp_path).encode() not in text
        assert str(demo).encode() not in text
        assert hub.strange == []
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert TOKEN not in metrics.output
