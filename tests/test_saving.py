# SPDX-License-Identifier: Apache-2.0
"""What is saved scores as it was trained: in Transformers, in our loader, and with DeepSpeed-Chat's keys."""

import json
import os
import stat

import architectures
import models
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from reward_model.common.errors import UserError
from reward_model.config.groups import OutputConfig
from reward_model.config.options import require_usable_folder
from reward_model.inference import load
from reward_model.models import attention_choice, lora
from reward_model.models import saving as checkpoint
from reward_model.models.attention import SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, head_layer, resize_embedding
from reward_model.models.st_modules import pooling_in
from reward_model.reward_model import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSED = [family for family in models.FAMILIES if family not in models.NO_CLASS]
# Measured over these families: at most 1.1 % of the scores' spread. Transformers multiplies the head in bfloat16.
BFLOAT16_TOLERANCE = 0.02


def trained(family, folder, dtype=torch.float32, **options):
    """A scorer whose weights have moved, in evaluation mode, with its tokenizer."""
    tokenizer = models.write(family, folder)
    scorer = load_for_training(str(folder), dtype, seed=3, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        head_layer(scorer).weight.add_(0.3 * torch.randn_like(head_layer(scorer).weight))
    for config in (scorer.config, scorer.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    return scorer.eval(), tokenizer


@torch.no_grad()
def score(scorer, batch):
    at = torch.arange(len(batch.ends)) * batch.input_ids.shape[1] + batch.ends
    return scorer(batch.input_ids, batch.attention_mask, at)


@torch.no_grad()
def transformers_scores(folder, batch, **options):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 1
    return model.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)


@pytest.mark.parametrize("family", CLASSED)
def test_transformers_scores_as_the_trainer_does(family, tmp_path):
    scorer, tokenizer = trained(family, tmp_path / "base")
    batch = models.batch(tokenizer)
    expected = score(scorer, batch)
    assert expected.std() > 0.05
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    torch.testing.assert_close(transformers_scores(tmp_path / "out", batch), expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reloaded.pad_token_id == AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "gpt_neox", "gemma2"])
def test_bfloat16_within_its_tolerance(family, tmp_path):
    scorer, tokenizer = trained(family, tmp_path / "base", torch.bfloat16)
    batch = models.batch(tokenizer, rows=32)
    expected = score(scorer, batch)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    found = transformers_scores(tmp_path / "out", batch, dtype=torch.bfloat16).float()
    assert (found - expected).abs().max() <= BFLOAT16_TOLERANCE * expected.std()
    ours = load(tmp_path / "out").scorer
    assert next(ours.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(score(ours, batch), expected, atol=1e-6, rtol=1e-6)


WITHOUT_A_CLASS = [("cohere", None), ("cohere", "mean"), ("llama", "mean"), ("opt", "mean"), ("bert", "mean")]


@pytest.mark.parametrize(("family", "pooling"), [*WITHOUT_A_CLASS, ("deberta", "mean")])
def test_modules_of_sentence_transformers_load_and_train_on(family, pooling, tmp_path, capsys):
    scorer, tokenizer = trained(family, tmp_path / "base", pooling=pooling)
    scorer.config.score_mean = 0.25
    batch = models.batch(tokenizer)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    assert "saved as modules of Sentence-Transformers" in capsys.readouterr().out
    reward = load(tmp_path / "out")
    torch.testing.assert_close(score(reward.scorer, batch), score(scorer, batch), atol=1e-6, rtol=1e-6)
    assert (reward.mean, "is not read" in capsys.readouterr().out) == (0.25, False)
    again = load_for_training(str(tmp_path / "out"), torch.float32, seed=9)
    torch.testing.assert_close(score(again, batch), score(scorer, batch), atol=1e-6, rtol=1e-6)
    assert again.pooling == (pooling or "last")
    with pytest.raises(UserError, match="leave the flag out"):
        load_for_training(str(tmp_path / "out"), torch.float32, seed=9, pooling="last" if pooling else "mean")


@torch.no_grad()
@pytest.mark.parametrize(("family", "pooling"), WITHOUT_A_CLASS)
def test_the_modules_mean_what_they_say(family, pooling, tmp_path):
    """Computed from the files as Sentence-Transformers does, right up to the bias that takes the mean off."""
    scorer, tokenizer = trained(family, tmp_path / "base", pooling=pooling)
    scorer.config.score_mean = 0.25
    batch = models.batch(tokenizer)
    out = tmp_path / "out"
    checkpoint.save(scorer, tokenizer, out)
    pooled = json.loads((out / "1_Pooling" / "config.json").read_text())
    dense = json.loads((out / "2_Dense" / "config.json").read_text())
    assert (dense["out_features"], dense["bias"]) == (1, True)
    assert dense["activation_function"] == "torch.nn.modules.linear.Identity"
    assert next(name for name, value in pooled.items() if value is True) == (
        "pooling_mode_mean_tokens" if pooling else "pooling_mode_lasttoken"  # vLLM takes the first that is true
    )
    weights = load_file(out / "2_Dense" / "model.safetensors")
    hidden = AutoModel.from_pretrained(out).eval()(batch.input_ids, attention_mask=batch.attention_mask)[0]
    mask = batch.attention_mask[..., None]
    means = (hidden * mask).sum(1) / mask.sum(1) if pooling else hidden[torch.arange(len(hidden)), batch.ends]
    found = (means @ weights["linear.weight"].T + weights["linear.bias"]).squeeze(-1)
    torch.testing.assert_close(found, score(scorer, batch) - 0.25, atol=1e-5, rtol=1e-5)


def test_our_form_of_before_still_loads(tmp_path):
    """What was saved before there were modules: all weights in one file, and how they pool beside it."""
    scorer, tokenizer = trained("bert", tmp_path / "base", pooling="mean")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    for name in ("modules.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    save_file(scorer.model.state_dict(), tmp_path / "out" / "reward_model.safetensors")
    (tmp_path / "out" / "reward_model.json").write_text('{"pooling": "mean"}')
    batch = models.batch(tokenizer)
    torch.testing.assert_close(score(load(tmp_path / "out").scorer, batch), score(scorer, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spoilt", ["weight", "width"])
def test_modules_with_something_missing_are_refused(spoilt, tmp_path):
    scorer, tokenizer = trained("bert", tmp_path / "base", pooling="mean")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    if spoilt == "weight":
        state = load_file(tmp_path / "out" / "model.safetensors")
        del state["encoder.layer.1.output.dense.weight"]
        save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        says = "lacks 1 of the model's weights, encoder.layer.1.output.dense.weight"
    else:
        save_file({"linear.weight": torch.zeros(1, 7)}, tmp_path / "out" / "2_Dense" / "model.safetensors")
        says = "its dense layer takes 7 numbers, and the model gives 32"
    with pytest.raises(UserError, match=says):
        load(tmp_path / "out")


def test_an_encoder_of_others_is_no_reward_model(tmp_path):
    """Embeddings of more numbers, another function, other modules: the head is a new one."""
    scorer, tokenizer = trained("bert", tmp_path / "base", pooling="mean")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    dense = tmp_path / "out" / "2_Dense" / "config.json"
    values = json.loads(dense.read_text())
    assert pooling_in(tmp_path / "out") == "mean"
    for change in ({"out_features": 2}, {"activation_function": "torch.nn.modules.activation.Tanh"}):
        dense.write_text(json.dumps(values | change))
        assert pooling_in(tmp_path / "out") is None
    dense.write_text(json.dumps(values))
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules[:2]))
    assert pooling_in(tmp_path / "out") is None


@torch.no_grad()
def test_mean_pooling_is_the_mean_over_a_texts_tokens(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path, pooling="mean")
    batch = models.batch(tokenizer)
    for row in range(3):
        length = int(batch.ends[row]) + 1
        hidden = scorer.backbone(batch.input_ids[row : row + 1, :length])[0][0]
        expected = hidden.mean(0) @ scorer.model.v_head.weight[0]
        torch.testing.assert_close(score(scorer, batch)[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*models.DECODERS, "cohere"])
def test_dschat_form_has_upstreams_keys_and_the_same_scores(family, tmp_path):
    scorer, tokenizer = trained(family, tmp_path / "base")
    batch = models.batch(tokenizer)
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "dschat")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert state["v_head.weight"].shape[0] == 1
    # what upstream's loader builds: AutoModel under its reward model, embedding fitted to the tokenizer
    backbone = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    backbone.resize_token_embeddings(8 * -(-len(tokenizer) // 8))
    upstream = RewardModel(backbone, tokenizer, num_padding_at_beginning=0).eval()
    assert set(state) == set(upstream.state_dict())
    upstream.load_state_dict(state)
    torch.testing.assert_close(score(Scorer(upstream, "last"), batch), score(scorer, batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score(load(tmp_path / "out").scorer, batch), score(scorer, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("form", ["dschat", "both"])
def test_dschat_form_is_no_invitation_to_transformers(family, form, tmp_path, capsys):
    """It would know no key of pytorch_model.bin, and take random weights."""
    tokenizer = models.write(family, tmp_path / "base", vocab_size=512)
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=0)
    checkpoint.save(scorer, tokenizer, tmp_path / "out", form)
    said = "Transformers will refuse this folder" in capsys.readouterr().out
    batch = models.batch(tokenizer)
    rows = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(len(rows[name]) == 320 for name in rows if name.endswith("embed_tokens.weight"))
    if form == "both":
        assert not said
        assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == 512
        if family == "llama":
            assert transformers_scores(tmp_path / "out", batch) == pytest.approx(score(scorer, batch), abs=1e-5)
        return
    assert said
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == 320
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises((OSError, ValueError), match=r"none-for-Transformers|Unrecognized configuration class"):
            auto_class.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        score(load(tmp_path / "out", form="dschat").scorer, batch), score(scorer, batch), atol=1e-5, rtol=1e-5
    )


def test_dschat_form_of_ids_beyond_its_rows_is_refused(tmp_path, monkeypatch):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    beyond = {"<|far|>": 400, **tokenizer.get_vocab()}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: beyond)
    with pytest.raises(UserError, match="keeps 320 rows for the tokenizer's 319 tokens, and the largest id is 400"):
        checkpoint.require_dschat(scorer, tokenizer)


def test_old_spelling_of_dschat_keys_loads(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "dschat")
    file = tmp_path / "out" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save({name.replace("rwtransformer", "rwtranrsformer"): weight for name, weight in state.items()}, file)
    batch = models.batch(tokenizer)
    torch.testing.assert_close(score(load(tmp_path / "out").scorer, batch), score(scorer, batch), atol=1e-5, rtol=1e-5)


def test_dschat_form_with_weights_missing_is_refused(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "dschat")
    file = tmp_path / "out" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    del state["v_head.weight"]
    torch.save(state, file)
    with pytest.raises(UserError, match="v_head"):
        load(tmp_path / "out")


def test_both_forms_in_one_folder(tmp_path):
    scorer, tokenizer = trained("gpt2", tmp_path / "base")
    batch = models.batch(tokenizer)
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "both")
    torch.testing.assert_close(transformers_scores(tmp_path / "out", batch), score(scorer, batch), atol=1e-5, rtol=1e-5)
    assert "rwtransformer.wte.weight" in torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)


def test_dschat_form_of_an_encoder_is_refused(tmp_path):
    scorer, tokenizer = trained("bert", tmp_path / "base")
    with pytest.raises(UserError, match="dschat"):
        checkpoint.save(scorer, tokenizer, tmp_path / "out", "dschat")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "deberta", "bert", "cohere"])
def test_lora_is_merged_and_its_adapter_saved(family, tmp_path):
    from peft import PeftModel

    scorer, tokenizer = trained(family, tmp_path / "base")
    base = tmp_path / "grown"  # the model that the adapter belongs to
    checkpoint.save(scorer, tokenizer, base)
    add_lora(scorer, dim=4, alpha=6, module_name=None)
    trainable = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save" in name for name in trainable)
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if name in trainable:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = models.batch(tokenizer)
    expected = score(scorer.eval(), batch)
    assert (expected - score(load(base).scorer, batch)).abs().max() > 0.01
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    if family == "cohere":
        torch.testing.assert_close(score(load(tmp_path / "out").scorer, batch), expected, atol=1e-4, rtol=1e-4)
        return
    torch.testing.assert_close(transformers_scores(tmp_path / "out", batch), expected, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert f"base_model: {scorer.model.peft_config['default'].base_model_name_or_path}\n" in card
    with_adapter = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "out" / "adapter"
    )
    with torch.no_grad():
        found = with_adapter.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


EXPERTS = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_adapter_beside_experts_is_whole_or_is_not_written(kind, tmp_path, capsys):
    """PEFT takes names of dense layers for those of Transformers 4's experts, and moves their adapters."""
    from peft import PeftModel

    if kind not in architectures.text_types():
        pytest.skip(f"this Transformers has no {kind}")
    if kind == "deepseek_v3":  # for which architectures.py has no sizes of Transformers 4
        pytest.importorskip("transformers.conversion_mapping")
    architectures.make(kind, tmp_path / "base")
    scorer, tokenizer = load_for_training(str(tmp_path / "base"), torch.float32, seed=3), tiny.tokenizer()
    for config in (scorer.config, scorer.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    checkpoint.save(scorer, tokenizer, tmp_path / "start")
    add_lora(scorer, dim=4, alpha=4, module_name=None)
    said = capsys.readouterr().out
    stacked = any("expert" in name for name in lora.stacked_weights(scorer.backbone))  # not so in Transformers 4
    assert stacked == ("LoRA: the experts' weights, " in said)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = models.batch(tokenizer)
    expected = score(scorer.eval(), batch)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    torch.testing.assert_close(score(load(tmp_path / "out").scorer, batch), expected, atol=1e-4, rtol=1e-4)
    if not (tmp_path / "out" / "adapter").exists():
        assert kind == "deepseek_v3"
        assert (
            "no adapter/ is written: PEFT, when it loads one, moves those of layers such as" in capsys.readouterr().out
        )
        return
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        found = with_adapter(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_lora_on_named_layers_only_and_a_name_that_fits_nothing(tmp_path):
    scorer, _ = trained("opt", tmp_path / "base")
    with pytest.raises(UserError, match="no layer's name"):
        add_lora(scorer, 2, 2, "decoder.blocks.")
    add_lora(scorer, 2, 2, "decoder.layers.1.")
    adapted = [name for name, _ in scorer.named_parameters() if "lora_" in name]
    assert adapted
    assert all("decoder.layers.1." in name for name in adapted)


def test_lora_dropout_works_in_training_alone(tmp_path, monkeypatch):
    """Neither a score nor the check of a shared prompt, which runs a model in training too, hangs on it."""
    scorer, tokenizer = trained("llama", tmp_path / "base")
    add_lora(scorer, 4, 8, None, dropout=0.5)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = models.batch(tokenizer)
    plain = score(scorer.eval(), batch)
    assert (score(scorer.train(), batch) - score(scorer, batch)).abs().max() > 0.01
    monkeypatch.setattr(attention_choice, "first_text", lambda text: text)  # of one rank
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), tokenizer.pad_token_id)
    assert forward.choose_attention(longest=20) == "prompts are shared: slices attention"
    forward.use(SEPARATE)
    assert torch.equal(score(scorer.eval(), batch), plain)
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    torch.testing.assert_close(transformers_scores(tmp_path / "out", batch), plain, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_a_grown_embedding_is_saved_and_never_shrinks(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    resize_embedding(scorer, 12)
    assert scorer.backbone.get_input_embeddings().weight.shape[0] == models.VOCABULARY
    resize_embedding(scorer, models.VOCABULARY + 1)
    assert scorer.backbone.get_input_embeddings().weight.shape[0] == models.VOCABULARY + 8
    batch = models.batch(tokenizer)
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "both")
    torch.testing.assert_close(transformers_scores(tmp_path / "out", batch), score(scorer, batch), atol=1e-5, rtol=1e-5)


def test_files_have_the_users_permissions_and_nothing_is_left_over(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    before = os.umask(0o027)
    try:
        checkpoint.save(scorer, tokenizer, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}
    assert not (tmp_path / "out" / ".saving").exists()


def test_full_disk_is_one_line_and_leaves_no_half_model(tmp_path, monkeypatch):
    scorer, tokenizer = trained("llama", tmp_path / "base")

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(scorer.model), "save_pretrained", no_space)
    with pytest.raises(UserError, match="no space left"):
        checkpoint.save(scorer, tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_space_is_asked_for_beforehand(tmp_path):
    checkpoint.require_space(tmp_path, 1)
    with pytest.raises(UserError, match="free, the model takes"):
        checkpoint.require_space(tmp_path, 10**18)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_a_run_is_refused_and_one_with_a_log_is_not(name, tmp_path):
    output = OutputConfig(output_dir=str(tmp_path))
    (tmp_path / "training.log").write_text("")
    require_usable_folder(output)
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=name):
        require_usable_folder(output)


def test_scoring_texts_from_a_folder(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    reward = load(tmp_path / "out")
    prompts, responses = ["the cat", "where is the cat?", "x"], [" sat", " on the mat and there", " y"]
    together = reward.score(prompts, responses, batch_size=2)
    alone = [reward.score([p], [r])[0] for p, r in zip(prompts, responses)]
    assert together == pytest.approx(alone, abs=1e-5)
    ids = torch.tensor([[*tokenizer(prompts[1] + responses[1])["input_ids"], tokenizer.eos_token_id]])
    expected = scorer(ids, torch.ones_like(ids), torch.tensor([ids.shape[1] - 1])).item()
    assert together[1] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="one of each"):
        reward.score(["a"], [])


def test_scoring_chats(tmp_path):
    scorer, _ = trained("llama", tmp_path / "base")
    tokenizer = tiny.chatml()
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"  # the template's own end
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    expected = scorer(ids, torch.ones_like(ids), torch.tensor([ids.shape[1] - 1])).item()
    reward = load(tmp_path / "out")
    assert reward.score_chats([chat]) == pytest.approx([expected], abs=1e-5)
    shared = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]
    assert reward.score_chats([shared]) == pytest.approx([expected], abs=1e-5)
    tools = reward.tokenizer
    tools.chat_template = "{{ tools | tojson }}{{ loud }}" + tools.chat_template
    told = tools('[{"name": "look"}]!' + text)["input_ids"]
    expected = scorer(torch.tensor([told]), torch.ones(1, len(told)), torch.tensor([len(told) - 1])).item()
    assert reward.score_chats([chat], tools=[{"name": "look"}], loud="!") == pytest.approx([expected], abs=1e-5)


@pytest.mark.skipif(transformers.__version__ < "5", reason="Transformers 4 has no rope_parameters")
def test_what_needs_transformers_5_is_told(tmp_path, capsys):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    assert "Transformers 4" not in capsys.readouterr().out
    scorer.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    checkpoint.save(scorer, tokenizer, tmp_path / "other")
    assert "score with Transformers 5 only: Transformers 4 has no setting for" in capsys.readouterr().out


def test_other_programs_read_the_raw_score(tmp_path):
    """Transformers' pipeline, vLLM and CrossEncoder put a sigmoid on one label, unless the config says otherwise."""
    from transformers import pipeline

    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out", "both")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    text = "the cat sat" + tokenizer.eos_token
    found = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")(text)
    assert found[0]["score"] == pytest.approx(load(tmp_path / "out").score(["the cat"], [" sat"])[0], abs=1e-5)


def test_what_is_no_list_of_chats_is_told(tmp_path):
    scorer, tokenizer = trained("llama", tmp_path / "base")
    checkpoint.save(scorer, tokenizer, tmp_path / "out")
    reward = load(tmp_path / "out")
    assert reward.score_chats([]) == []
    with pytest.raises(UserError, match="a list of chats, each a list of messages"):
        reward.score_chats([{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match="chat messages need a tokenizer with a chat template, and this one has none"):
        reward.score_chats([[{"role": "user", "content": "a"}]])
    with pytest.raises(UserError, match="chat 1 is not a list of messages with role and content"):
        reward.score_chats([["a"]])
    with pytest.raises(UserError, match=r"text 2 has half a character, .ud83d"):
        reward.score(["a", "b"], ["c", "\ud83d"])
