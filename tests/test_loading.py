# SPDX-License-Identifier: Apache-2.0
"""Loading: whose weights a model has, when its head is a new one, and its dropout."""

import inspect
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import models
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, FineGrainedFP8Config

from reward_model.common.errors import UserError
from reward_model.data.tokenizer import load_tokenizer
from reward_model.inference import load
from reward_model.models import adapters, saving
from reward_model.models import loading as ours
from reward_model.models.loading import load_for_training
from reward_model.models.saved_forms import set_dropout
from reward_model.models.scorer import head_layer
from reward_model.training.data import require_positions

pytestmark = pytest.mark.usefixtures("one_thread")


def write_classifier(family, folder, labels):
    models.write(family, folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    classifier.save_pretrained(folder)
    return classifier.state_dict()


@pytest.fixture(params=["llama", "bert"])
def family(request):
    return request.param


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_for_other_labels_gives_way_and_all_else_is_loaded(family, labels, tmp_path):
    written = write_classifier(family, tmp_path, labels)
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0)
    assert head_layer(scorer).weight.shape[0] == 1
    for name, weight in scorer.backbone.state_dict().items():
        assert torch.equal(weight, written[f"{scorer.unwrapped.base_model_prefix}.{name}"])


def test_a_head_with_one_label_is_loaded(family, tmp_path):
    written = write_classifier(family, tmp_path, 1)
    for name, weight in load_for_training(str(tmp_path), torch.float32, seed=0).unwrapped.state_dict().items():
        assert torch.equal(weight, written[name])


def test_zero_3_refuses_what_transformers_cannot_load_there(family, tmp_path, monkeypatch):
    write_classifier(family, tmp_path, 2)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match=r"a classifier of 2 labels: .*--zero_stage 2") as caught:
        load_for_training(str(tmp_path), torch.float32, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("report", [["model.norm.weight"], [("model.norm.weight", (0,), (8,))]])  # Transformers 4 and 5
def test_weights_that_transformers_dropped_for_their_shape_stop_the_run(tmp_path, monkeypatch, report):
    models.write("llama", tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained

    def from_pretrained(*arguments, **options):
        loaded, info = load(*arguments, **options)
        return loaded, {**info, "mismatched_keys": report}

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, model\.norm\.weight"):
        load_for_training(str(tmp_path), torch.float32, seed=0)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, 1),
        ({}, 1),
        ({"architectures": ["LlamaForSequenceClassification"]}, 2),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, 1),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, 1),
        ({"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
    ],
    ids=json.dumps,
)
def test_labels_of_a_checkpoints_own_head(fields, labels):
    assert ours._labels_of_head(fields) == labels


def test_dropout_flag_reaches_every_dropout():
    from transformers import BertConfig, GPT2Config, OPTConfig

    for config in (BertConfig(), GPT2Config(), OPTConfig(layerdrop=0.3)):
        set_dropout(config, 0.25)
        named = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float) and k != "layerdrop"}
        assert named
        assert set(named.values()) == {0.25}
        assert getattr(config, "layerdrop", 0.3) == 0.3


# Heads of other trainers.


def with_head(folder, weights, sharded=False):
    """A causal model with more weights in its checkpoint; its own weights."""
    models.write("llama", folder)
    state = load_file(folder / "model.safetensors")
    if sharded:
        save_file(weights, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        names = dict.fromkeys(state, "model-00001-of-00002.safetensors")
        names |= dict.fromkeys(weights, "model-00002-of-00002.safetensors")
        index = {"metadata": {"total_size": 0}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state | weights, folder / "model.safetensors", {"format": "pt"})
    return state


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "name",
    ["value_head.weight", "v_head.summary.weight", "reward_head.weight", "score.0.weight", "rm_head.weight",
     "regression_layer.weight", "classifier.weight", "model.critic_head.weight", "last.weight", "lm_head.weight",
     "head.weight"],
)  # fmt: skip
def test_the_head_of_another_trainer_is_read(name, sharded, tmp_path, capsys):
    hidden = head_width(tmp_path / "plain")
    weight = torch.arange(hidden, dtype=torch.float32).reshape(1, -1) / 100
    with_head(tmp_path / "model", {name: weight, name.replace("weight", "bias"): torch.tensor([0.5])}, sharded)
    scorer = load_for_training(str(tmp_path / "model"), torch.float32, seed=0, expect_head=True)
    assert torch.equal(head_layer(scorer).weight, weight)
    out = capsys.readouterr().out
    assert f"score head: read from {name}" in out
    assert f"{name.replace('weight', 'bias')} is not read: every score is 0.5 lower than with it" in out
    assert "loaded head" in out


def head_width(folder):
    models.write("llama", folder)
    return head_layer(load_for_training(str(folder), torch.float32, seed=0)).in_features


def test_a_head_of_several_layers_stops_the_run(tmp_path, capsys):
    hidden = head_width(tmp_path / "plain")
    layers = {"score.0.weight": torch.zeros(hidden, hidden), "score.2.weight": torch.zeros(1, hidden)}
    with_head(tmp_path / "model", layers)
    with pytest.raises(
        UserError, match=r"a head that is not one linear layer .*score\.0\.weight.*--new_head"
    ) as caught:
        load_for_training(str(tmp_path / "model"), torch.float32, seed=0)
    assert "\n" not in str(caught.value)
    scorer = load_for_training(str(tmp_path / "model"), torch.float32, seed=7, new_head=True)
    plain = load_for_training(str(tmp_path / "plain"), torch.float32, seed=7)
    assert torch.equal(head_layer(scorer).weight, head_layer(plain).weight)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_zero_3_at_which_transformers_names_no_unread_weight(family, tmp_path, monkeypatch, capsys):
    auto = AutoModel if family == "cohere" else AutoModelForSequenceClassification
    plain = auto.from_pretrained

    def from_pretrained(*arguments, **options):
        loaded, info = plain(*arguments, **options)
        return loaded, {**info, "unexpected_keys": set()}

    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    weight = torch.arange(32, dtype=torch.float32)[None] / 100
    models.write(family, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    load_for_training(str(tmp_path), torch.float32, seed=0)
    assert "new head" in capsys.readouterr().out
    for name in ("v_head", "last"):
        save_file(state | {f"{name}.weight": weight, f"{name}.bias": torch.ones(1)}, file, {"format": "pt"})
        scorer = load_for_training(str(tmp_path), torch.float32, seed=0, expect_head=True)
        assert torch.equal(head_layer(scorer).weight, weight)
        assert f"{name}.bias is not read: every score is 1 lower than with it" in capsys.readouterr().out
    save_file(state | {"score.0.weight": torch.ones(32, 32), "score.2.weight": weight}, file, {"format": "pt"})
    with pytest.raises(UserError, match="a head that is not one linear layer"):
        load_for_training(str(tmp_path), torch.float32, seed=0)
    save_file(state | {"model.layers.0.mlp.up_proj.weight_scale": weight}, file, {"format": "pt"})
    with pytest.raises(UserError, match="is quantized, though"):
        load_for_training(str(tmp_path), torch.float32, seed=0)


def test_a_head_in_a_file_beside_the_model_is_read(tmp_path, capsys):
    """LLaMA-Factory's form."""
    weight = torch.arange(head_width(tmp_path / "plain"), dtype=torch.float32)[None] / 100
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}
    for kind in ("safetensors", "bin"):
        folder = tmp_path / kind
        models.write("llama", folder)
        if kind == "bin":
            torch.save(head, folder / "value_head.bin")
        else:
            save_file(head, folder / "value_head.safetensors", {"format": "pt"})
        scorer = load_for_training(str(folder), torch.float32, seed=0, expect_head=True)
        assert torch.equal(head_layer(scorer).weight, weight)
        assert "score head: read from v_head.summary.weight" in capsys.readouterr().out


def test_the_head_of_another_encoder_is_never_replaced_in_silence(tmp_path, capsys):
    models.write("bert", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"reward_head.weight": torch.ones(1, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"that BertForSequenceClassification does not read \(reward_head.*--new_head"):
        load_for_training(str(tmp_path), torch.float32, seed=0)
    load_for_training(str(tmp_path), torch.float32, seed=0, new_head=True)
    out = capsys.readouterr().out
    assert "new head" in out
    assert "weights that are not read: reward_head.weight\n" in out


@pytest.mark.parametrize("extra", [{}, {"new_head": True}])
def test_a_head_of_more_rows_than_the_config_says(extra, tmp_path):
    state = with_head(tmp_path, {"score.weight": torch.ones(5, 32)})
    if not extra:
        with pytest.raises(UserError, match=r"of other sizes than its config.json says; .*--new_head draws a new one"):
            load_for_training(str(tmp_path), torch.float32, seed=0)
        return
    scorer = load_for_training(str(tmp_path), torch.float32, seed=0, **extra)
    assert head_layer(scorer).weight.shape == (1, 32)
    for name, weight in scorer.unwrapped.state_dict().items():
        assert name == "score.weight" or torch.equal(weight, state[name])


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes"),
    [
        ("LlamaForCausalLM", "LlamaConfig", models.GROUPED),
        ("GPT2LMHeadModel", "GPT2Config", models.GPT2),
        ("RwkvForCausalLM", "RwkvConfig", {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}),
        ("BertForPreTraining", "BertConfig", models.SIZES),
        ("ElectraForPreTraining", "ElectraConfig", models.SIZES | {"embedding_size": 32}),
        ("ModernBertForMaskedLM", "ModernBertConfig", models.SIZES),
        ("DebertaV2ForMaskedLM", "DebertaV2Config", models.SIZES),
    ],
)
def test_a_language_model_s_own_head_needs_no_line(model_class, config_class, sizes, tmp_path, capsys):
    config = getattr(transformers, config_class)(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    getattr(transformers, model_class)(config).save_pretrained(tmp_path)
    load_for_training(str(tmp_path), torch.float32, seed=0)
    out = capsys.readouterr().out
    assert "not read" not in out
    assert "new head" in out


def test_a_model_without_a_vocabulary_is_loaded(tmp_path, capsys):
    """CANINE reads characters; that it cannot be scored here is found later."""
    config = transformers.CanineConfig(**{name: size for name, size in models.SIZES.items() if name != "vocab_size"})
    transformers.CanineModel(config).save_pretrained(tmp_path)
    load_for_training(str(tmp_path), torch.float32, seed=0)
    assert "new head" in capsys.readouterr().out


def test_a_trained_head_gives_way_to_a_new_one(tmp_path, capsys):
    write_classifier("llama", tmp_path, 1)
    drawn = [head_layer(load_for_training(str(tmp_path), torch.float32, 7, new_head=new)).weight for new in (1, 0)]
    assert not torch.equal(*drawn)
    assert drawn[0].std() < 0.05
    write_classifier("bert", tmp_path / "bert", 1)
    with pytest.raises(UserError, match="--new_head: an encoder's classification head stays as it is"):
        load_for_training(str(tmp_path / "bert"), torch.float32, 7, new_head=True)


def test_a_dropped_bias_and_other_weights_are_named_once_and_a_language_model_s_head_is_not(tmp_path, capsys):
    written = write_classifier("llama", tmp_path / "one", 1)
    more = {"score.bias": torch.tensor([-0.25]), "adapter.down": torch.zeros(2, 2), "lm_head.weight": torch.zeros(3, 2)}
    save_file({**written, **more}, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    load_for_training(str(tmp_path / "one"), torch.float32, seed=0)
    out = capsys.readouterr().out
    assert "score.bias is not read: every score is -0.25 lower than with it" in out
    assert f"{tmp_path / 'one'}: weights that are not read: adapter.down\n" in out
    assert "lm_head" not in out


# Checkpoints that are stored as something else.


def test_fp8_weights_become_numbers_and_are_saved_as_such(tmp_path, capsys):
    models.write("llama", tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "model.safetensors")
    stored, block = {}, 16
    for name, weight in state.items():
        stored[name] = weight
        if ".layers." in name and weight.dim() == 2:
            rows, columns = (-(-size // block) for size in weight.shape)
            scale = torch.full((rows, columns), 0.01)
            stored[name] = (weight / 0.01).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            state[name] = stored[name].float() * 0.01
    folder = tmp_path / "fp8"
    shutil.copytree(tmp_path / "plain", folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    if "dequantize" not in inspect.signature(FineGrainedFP8Config.__init__).parameters:
        with pytest.raises(UserError, match=r"is quantized .fp8., and cannot be trained"):
            load_for_training(str(folder), torch.float32, seed=0)
        return
    scorer = load_for_training(str(folder), torch.float32, seed=0)
    assert f"{folder} is quantized: its weights are loaded, trained and saved as numbers" in capsys.readouterr().out
    for name, weight in scorer.unwrapped.state_dict().items():
        if name in state:
            assert torch.allclose(weight, state[name], atol=1e-6), name
    saving.save(scorer, tiny.tokenizer(), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, weight in scorer.unwrapped.state_dict().items():
        assert torch.equal(saved[name], weight)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_what_cannot_be_saved_as_evaluated_is_refused(method, tmp_path):
    models.write("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    for read in (lambda: load_for_training(str(tmp_path), torch.float32, 0), lambda: ours.read_config(str(tmp_path))):
        with pytest.raises(UserError, match=rf"is quantized .{method}., and cannot be trained and saved as"):
            read()


def test_quantized_weights_that_the_config_is_silent_about_are_refused(tmp_path):
    with_head(tmp_path, {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})
    for extra in ({}, {"new_head": True}):
        with pytest.raises(UserError, match=r"is quantized, though its config.json does not say how .*up_proj"):
            load_for_training(str(tmp_path), torch.float32, seed=0, **extra)


def test_fp8_at_zero_3_is_refused(tmp_path, monkeypatch):
    models.write("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="start from the checkpoint before quantization"):
        load_for_training(str(tmp_path), torch.float32, seed=0)


CODE = {
    "configuration_x.py": "from transformers import LlamaConfig\n\n\n"
    "class XConfig(LlamaConfig):\n    model_type = 'x'\n",
    "modeling_x.py": "from transformers import LlamaModel\n\nfrom .configuration_x import XConfig\n\n\n"
    "class XModel(LlamaModel):\n    config_class = XConfig\n",
}


def test_code_of_the_model_s_own_runs_only_when_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    models.write("llama", tmp_path / "model")
    tiny.tokenizer(tmp_path / "model")
    for name, text in CODE.items():
        (tmp_path / "model" / name).write_text(text)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    changed = config | {"model_type": "x", "auto_map": auto, "architectures": ["XModel"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
    state = load_file(tmp_path / "model" / "model.safetensors")
    state = {name.removeprefix("model."): weight for name, weight in state.items()}
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for read in (load_for_training, lambda name, *_, **__: ours.read_config(name)):
        with pytest.raises(UserError, match="code of its own, which runs only with --trust_remote_code"):
            read(str(tmp_path / "model"), torch.float32, seed=0)
    scorer = load_for_training(str(tmp_path / "model"), torch.float32, seed=0, trust_remote_code=True)
    saving.save(scorer, tiny.tokenizer(), tmp_path / "out")
    with pytest.raises(UserError, match="--trust_remote_code"):
        load(tmp_path / "out")
    again = load(tmp_path / "out", trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    expected = scorer(ids, torch.ones_like(ids), torch.tensor([2])).item()
    assert again.score_ids([[5, 6, 7]]) == pytest.approx([expected], abs=1e-6)


REWARD = """

class XReward(LlamaPreTrainedModel):
    config_class = XConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = XModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.v_head

    def get_decoder(self):
        return self.model
"""


def test_the_head_of_a_reward_model_s_own_class_is_taken(tmp_path, capsys):
    """As InternLM2's reward models have it: AutoModel gives a class that scores."""
    folder = tmp_path / "own_class"  # Transformers keeps code by the name of its folder
    weight = torch.arange(32, dtype=torch.float32)[None] / 100
    with_head(folder, {"v_head.weight": weight})
    tiny.tokenizer(folder)
    code = CODE["modeling_x.py"].replace("import LlamaModel", "import LlamaModel, LlamaPreTrainedModel")
    (folder / "modeling_x.py").write_text("from torch import nn\n" + code + REWARD)
    (folder / "configuration_x.py").write_text(CODE["configuration_x.py"])
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XReward"}
    changed = config | {"model_type": "x", "auto_map": auto, "architectures": ["XReward"]}
    (folder / "config.json").write_text(json.dumps(changed))
    scorer = load_for_training(str(folder), torch.float32, seed=0, expect_head=True, trust_remote_code=True).eval()
    assert torch.equal(head_layer(scorer).weight, weight)
    out = capsys.readouterr().out
    assert "score head: that of XReward" in out
    assert "loaded head" in out
    saving.save(scorer, tiny.tokenizer(), tmp_path / "own_class_saved")
    again = load(tmp_path / "own_class_saved", trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    expected = scorer(ids, torch.ones_like(ids), torch.tensor([2])).item()
    assert again.score_ids([[5, 6, 7]]) == pytest.approx([expected], abs=1e-6)


def test_a_tokenizer_with_code_of_its_own_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    tiny.tokenizer(tmp_path)
    (tmp_path / "tok_x.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass XTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": [None, "tok_x.XTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no tokenizer in .* which runs only with --trust_remote_code"):
        load_tokenizer(str(tmp_path))
    assert type(load_tokenizer(str(tmp_path), trust_remote_code=True)).__name__ == "XTokenizer"


# What a run saves is a start of another run.


@pytest.mark.parametrize("save_format, pooling", [("dschat", None), ("hf", "mean"), ("hf", None)])
def test_every_saved_form_is_a_start(save_format, pooling, tmp_path, capsys):
    models.write("llama", tmp_path / "base")
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=3, pooling=pooling)
    tokenizer = tiny.tokenizer()
    scorer.config.pad_token_id = tokenizer.pad_token_id
    saving.save(scorer, tokenizer, tmp_path / "out", save_format)
    again = load_for_training(str(tmp_path / "out"), torch.float32, seed=9)
    assert "loaded head" in capsys.readouterr().out
    ids = torch.tensor([[5, 6, 7]])
    one, two = (each.eval()(ids, torch.ones_like(ids), torch.tensor([2])) for each in (scorer, again))
    assert torch.allclose(one, two, atol=1e-6)
    assert again.pooling == scorer.pooling
    drawn = load_for_training(str(tmp_path / "out"), torch.float32, seed=3, new_head=True)
    assert torch.equal(head_layer(drawn).weight, head_layer(scorer).weight)  # the seed of the first
    if save_format == "dschat" or pooling:
        with pytest.raises(UserError, match="was trained with"):
            load_for_training(str(tmp_path / "out"), torch.float32, 0, pooling="last" if pooling else "mean")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(UserError, match="adapter is a LoRA adapter of someone/model: merge it first"):
        ours.read_config(str(tmp_path / "out" / "adapter"))
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"start from {tmp_path / 'out'}, where it is merged"):
        ours.read_config(str(tmp_path / "out" / "adapter"))


@pytest.mark.parametrize("positions, limit, says", [
    (64, 10**30, "65 tokens, and the model's positions are 64: --max_seq_len 64"),
    (64, 16, "65 tokens, and its tokenizer's model_max_length is 16: --max_seq_len 16"),
    (128, 16, "65 tokens, and its tokenizer's model_max_length is 16: --max_seq_len 16"),
    (-1, 10**30, None),  # XLNet's: no limit
    (None, 10**30, None),
    (65, 65, None),
])  # fmt: skip
def test_a_text_that_is_too_long_names_the_limit(positions, limit, says):
    config, tokenizer = SimpleNamespace(max_position_embeddings=positions), SimpleNamespace(model_max_length=limit)
    with pytest.raises(UserError, match=says) if says else nullcontext():
        require_positions(config, tokenizer, 65)


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "training_args.bin")])
def test_an_adapter_is_one_with_its_models_config_beside_it(beside, tmp_path):
    """OpenRLHF leaves that there, and Transformers' trainers their arguments."""
    for name in ("adapter_config.json", "adapter_model.safetensors", *beside):
        (tmp_path / name).touch()
    assert adapters.is_adapter(str(tmp_path))
    for weights in ("model.safetensors", "pytorch_model.bin", "reward_model.safetensors"):
        (tmp_path / weights).touch()
        assert adapters.is_adapter(str(tmp_path)) is ("config.json" not in beside)
        (tmp_path / weights).unlink()
