# SPDX-License-Identifier: Apache-2.0
"""Loading: whose weights a model has, when its head is a new one, and its dropout."""

import json

import models
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward_model.common.errors import UserError
from reward_model.models import loading as ours
from reward_model.models.loading import load_for_training, set_dropout
from reward_model.models.scorer import head_layer

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
