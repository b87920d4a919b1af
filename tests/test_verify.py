# SPDX-License-Identifier: Apache-2.0
"""What was saved is loaded afresh and compared with what was trained: right folders pass, spoilt ones do not."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import models
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from reward_model.data.comparisons import Comparison
from reward_model.data.tokenizer import choose_special_tokens
from reward_model.models import saving
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import head_layer
from reward_model.training import fresh_load, verify

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Saved:
    """A scorer with weights that have moved, saved in a folder, and what it is expected to say."""

    def __init__(self, root, family="llama", form="hf", dtype=torch.float32, lora=False, tokenizer=None, **options):
        own = models.write(family, root / "base")
        self.tokenizer = tokenizer or own
        self.scorer = load_for_training(str(root / "base"), dtype, seed=0, **options)
        if lora:
            add_lora(self.scorer, 4, 6, None)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.scorer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            head_layer(self.scorer).weight.add_(0.3 * torch.randn_like(head_layer(self.scorer).weight))
        self.special = choose_special_tokens(self.tokenizer, models.VOCABULARY)
        for config in (self.scorer.config, self.scorer.config.get_text_config()):
            config.pad_token_id = self.special.pad
        self.scorer.config.score_mean = 0.25
        self.forward = ForwardPass(self.scorer, self.scorer, dtype, torch.device("cpu"), self.special.pad)
        end = [self.special.end]
        texts = ["the cat sat on the mat", "where is the cat?", "x", "question: what does the cat eat? answer: fish."]
        rows = [self.tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts]
        rows = [ids if ids[-1] == end[0] else ids + end for ids in rows]
        self.rows = [Comparison(ids[:1], [ids[1:], [*ids[1:-1], 9, *end]], [0], [1]) for ids in rows]
        self.expected = verify.expect(self.forward, self.rows, self.tokenizer, self.special)
        self.forms = ("hf", "dschat") if form == "both" else (form,)
        self.folder = root / "out"
        self.names = saving.save(self.scorer, self.tokenizer, self.folder, form)

    def problem(self):
        """What differs, found in this process."""
        question = {"folder": self.folder, "forms": self.forms, "ids": self.expected.ids}
        question["second"] = self.expected.second
        question["written"] = [asdict(each) for each in self.expected.written]
        try:
            answer = fresh_load.answer(question | {"settings": list(self.expected.settings)})
        except Exception as error:
            answer = {"problem": str(error)}
        return verify.difference(answer, self.expected, self.tokenizer, self.special)

    def check(self):
        """How it went, in a process of its own."""
        return verify.check(self.folder, self.forms, self.expected, self.tokenizer, self.special)

    def change(self, name, **values):
        file = self.folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        *[(family, "hf", {}) for family in ("llama", "opt", "gpt2", "gemma2", "bert", "deberta", "roberta", "cohere")],
        *[(family, "both", {}) for family in ("llama", "gpt_neox", "cohere")],
        ("qwen2", "dschat", {}),
        ("llama", "hf", {"pooling": "mean"}),
        ("bert", "hf", {"pooling": "mean"}),
        *[(family, "both", {"lora": True}) for family in ("llama", "gpt2")],
        *[(family, "hf", {"dtype": torch.bfloat16}) for family in ("llama", "qwen3", "gpt_neox", "bert")],
        ("llama", "hf", {"dtype": torch.float16}),
        ("llama", "hf", {"tokenizer": "chatml"}),
        ("llama", "hf", {"tokenizer": "llama"}),
    ],
)
def test_a_right_folder_passes(family, form, options, tmp_path):
    if "tokenizer" in options:
        options = {"tokenizer": getattr(tiny, options["tokenizer"])()}
    saved = Saved(tmp_path, family, form, **options)
    assert len(saved.expected.ids) == 4
    if "dtype" not in options:
        assert torch.tensor(saved.expected.scores).std() > 10 * max(saved.expected.tolerances)
    assert len(saved.expected.written) == 8 + bool(saved.tokenizer.chat_template)
    assert saved.problem() == ""


def test_a_changed_weight_is_found(tmp_path):
    saved = Saved(tmp_path)
    file = saved.folder / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(state, file, metadata={"format": "pt"})
    assert "form hf gives held-out text" in saved.problem()
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    assert saved.problem() == "it does not load: 1 missing keys, model.norm.weight among them"


@pytest.mark.parametrize("form", ["dschat", "both"])
def test_a_changed_weight_of_step_3s_file_is_found(form, tmp_path):
    saved = Saved(tmp_path, form=form)
    file = saved.folder / saving.DSCHAT_WEIGHTS
    state = torch.load(file, weights_only=True)
    state["v_head.weight"] *= 1.1
    torch.save(state, file)
    assert "form dschat gives held-out text" in saved.problem()


def test_other_rotary_embeddings_are_found(tmp_path, monkeypatch):
    """As a library of another version would read them: the base of 10,000, and no scaling."""
    rope = {**LLAMA_3, "original_max_position_embeddings": 16}

    def write(family, folder):
        tokenizer = tiny.tokenizer(folder)
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model("llama", **models.GROUPED, rope_parameters=rope))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder)
        return tokenizer

    if not hasattr(AutoConfig.for_model("llama"), "rope_parameters"):
        pytest.skip("Transformers 4 has no rope_parameters")
    monkeypatch.setattr(models, "write", write)
    saved = Saved(tmp_path)
    assert saved.problem() == ""
    default = {"rope_type": "default", "rope_theta": 1e4}
    saved.change("config.json", rope_parameters=default, rope_theta=1e4, rope_scaling=None)
    assert "form hf gives held-out text" in saved.problem()


@pytest.mark.parametrize("pad", ["end", None])
def test_another_pad_is_found(pad, tmp_path):
    saved = Saved(tmp_path)
    saved.change("config.json", pad_token_id=saved.special.end if pad else None)
    assert saved.problem()


def test_a_sigmoid_of_the_pipeline_is_found(tmp_path):
    saved = Saved(tmp_path)
    assert saved.problem() == ""
    values = json.loads((saved.folder / "config.json").read_text())
    del values["problem_type"]
    (saved.folder / "config.json").write_text(json.dumps(values))
    assert "Transformers' pipeline gives held-out text 1 0." in saved.problem()


def test_another_tokenizer_is_found(tmp_path):
    saved = Saved(tmp_path, tokenizer=tiny.llama())
    assert saved.problem() == ""
    content = json.loads((saved.folder / "tokenizer.json").read_text())
    tiny.tokenizer(sentences=("other words make other merges",)).save_pretrained(saved.folder)
    assert "the saved tokenizer gives text" in saved.problem()
    # a start token less
    (saved.folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    assert "the saved tokenizer gives text" in saved.problem()


def test_another_chat_template_is_found(tmp_path):
    saved = Saved(tmp_path, tokenizer=tiny.chatml())
    for template in saved.folder.glob("chat_template.jinja"):
        template.write_text(tiny.CHATML.replace("user", "USER").replace("<|im_start|>{{", "<|im_start|> {{"))
    assert "the saved chat template writes '<|im_start|> user" in saved.problem()


def test_a_template_that_writes_the_time_is_not_compared(tmp_path, monkeypatch):
    saved = Saved(tmp_path, tokenizer=tiny.chatml())
    written = [replace(each, text="13:59" + each.text) if each.messages else each for each in saved.expected.written]
    saved.expected = replace(saved.expected, written=written)
    assert saved.problem() == ""


def test_another_mean_is_found(tmp_path):
    saved = Saved(tmp_path)
    saved.change("config.json", score_mean=0.3)
    assert saved.problem() == "score_mean is 0.3 in config.json and was 0.25"


def test_texts_of_the_data_and_what_was_cut_from_them(tmp_path):
    saved = Saved(tmp_path, tokenizer=tiny.llama())
    text = "the cat sat on the mat"
    ids = verify.encoded(text, False, saved.tokenizer, saved.special)
    cut = [ids[0], *ids[4:]]
    for evaluated, is_right in ((ids, True), (cut, True), (ids[4:], True), ([*ids[:-2], 9, ids[-1]], False)):
        written = [verify.WrittenText(text, evaluated, templated=False)]
        saved.expected = verify.expect(saved.forward, saved.rows, saved.tokenizer, saved.special, written)
        assert saved.expected.written == written
        assert (saved.problem() == "") is is_right


def test_fewer_texts_for_a_larger_model():
    rows = [Comparison([1] * 10, [[2] * (i + 1)]) for i in range(100)]
    small, large, huge = (verify.choose_texts(rows, parameters) for parameters in (10**6, 10**11, 10**15))
    assert len(small) == 32
    assert 2 < len(large) < 32
    assert 2 * 10**11 * sum(text.tokens for text in large) <= verify.OPERATIONS
    assert len(huge) == 2
    assert [text.tokens for text in small] == sorted(text.tokens for text in small)
    assert len(verify.choose_texts(rows[:1], 10**6)) == 1


@pytest.mark.slow
def test_in_a_process_that_knows_nothing_of_the_run(tmp_path, monkeypatch, capsys):
    """No launcher's variables, no network, no device, and whatever folder the run is in."""
    saved = Saved(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    values = verify.plain_environment()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(values)
    assert (values["CUDA_VISIBLE_DEVICES"], values["HF_HUB_OFFLINE"]) == ("", "1")
    assert saved.check() == ("", "")
    assert (
        "verified: loaded afresh, the saved model scores 4 held-out texts as the trained one" in capsys.readouterr().out
    )
    (saved.folder / "model.safetensors").unlink()
    assert saved.check().differs.startswith("it does not load: OSError: Error no file named")


def test_too_little_memory_is_told(tmp_path, monkeypatch, capsys):
    saved = Saved(tmp_path)
    assert verify.free_memory() > 10**8
    monkeypatch.setattr(verify, "free_memory", lambda: 10**8)
    assert saved.check().not_verified.startswith("0.1 GB of host memory are free")
    assert "not verified: 0.1 GB of host memory are free, loading takes 1.5 GB" in capsys.readouterr().out


def test_a_process_that_dies_is_told(tmp_path, monkeypatch, capsys):
    saved = Saved(tmp_path)
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    assert saved.check().not_verified == "the process that loads the model ended with exit status 1"
    assert "not verified: the process that loads the model ended with exit status 1" in capsys.readouterr().out


def rehearse(saved):
    return verify.rehearse(saved.rows, saved.scorer.config, saved.tokenizer, saved.special)


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.llama, tiny.chatml, tiny.bert])
def test_a_tokenizer_that_can_be_saved_is_let_through(make, tmp_path):
    assert rehearse(Saved(tmp_path, tokenizer=make())) == ""


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_training(tmp_path, monkeypatch):
    saved = Saved(tmp_path, tokenizer=tiny.llama())
    backend = saved.tokenizer.backend_tokenizer.to_str()
    save = type(saved.tokenizer).save_pretrained

    def forgetful(self, folder):
        save(self, folder)
        content = json.loads(backend) | {"post_processor": None}
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content))

    monkeypatch.setattr(type(saved.tokenizer), "save_pretrained", forgetful)
    assert "the saved tokenizer gives text" in rehearse(saved)
    monkeypatch.setattr(type(saved.tokenizer), "save_pretrained", lambda self, folder: 1 / 0)
    assert rehearse(saved) == "config or tokenizer cannot be saved and loaded: ZeroDivisionError: division by zero"


SPOILING = """
import sys
from reward_model.commands import train
from reward_model.models import saving
save = saving.save
def spoilt(scorer, tokenizer, folder, *rest):
    names = save(scorer, tokenizer, folder, *rest)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    return names
saving.save = spoilt
try:
    if sys.argv[1] == "main":
        sys.exit(train.main(sys.argv[2:]))
    import reward_model
    reward_model.train(reward_model.RunConfig.of(**dict(zip(sys.argv[2::2], sys.argv[3::2]))))
except Exception as error:
    print(type(error).__name__, "raised:", error)
"""


@pytest.mark.parametrize("how", ["main", pytest.param("python", marks=pytest.mark.slow)])
def test_a_run_whose_model_is_saved_wrong_fails_in_one_line(how, demo, tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in (("train.jsonl", 32), ("eval.jsonl", 16)):
        lines = (demo / "data" / name).read_text().splitlines(keepends=True)
        (tmp_path / "data" / name).write_text("".join(lines[:rows]))
    values = {"model_name_or_path": demo / "model", "data_path": tmp_path / "data", "output_dir": tmp_path / "out"}
    values |= {"max_seq_len": 256, "data_output_path": demo / "cache", "learning_rate": 1e-3}
    words = [str(word) for name, value in values.items() for word in (("--" if how == "main" else "") + name, value)]
    environment = runs.environment(PYTHONPATH=str(runs.TOP), RANK=None, WORLD_SIZE=None, LOCAL_RANK=None)
    done = subprocess.run(
        [sys.executable, "-c", SPOILING, how, *words], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    kept = tmp_path / "out" / "unverified"
    said = f"what was saved is not what was evaluated, and lies in {kept}: form hf gives held-out text"
    if how == "main":
        assert done.returncode == 1
        assert f"error: {said}" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert f"UserError raised: {said}" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(kept))
    beside = {".lock", "evaluation.json", "metrics.jsonl", "report.html", "run.json", "unverified"}
    assert beside == set(os.listdir(tmp_path / "out"))
