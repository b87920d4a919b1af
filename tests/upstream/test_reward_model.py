# SPDX-License-Identifier: Apache-2.0
"""The drop-in against upstream's own reward_model.py, in the checkout that DEEPSPEED_EXAMPLES names."""

import importlib.util
import inspect
import os
from pathlib import Path

import pytest
import torch
import transformers
from reference import PAD, TOKENIZER, VOCABULARY, TinyBackbone, random_pairs

from reward_model.reward_model import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "applications/DeepSpeed-Chat/dschat/utils/model/reward_model.py"
KINDS = ("ragged", "full", "identical", "noise")
KEYS = ("loss", "chosen_mean_scores", "rejected_mean_scores")

# Scores stay below 2. Ours are float32 products; upstream's are rounded to the model's dtype, as is its loss:
# 2^-8 and 2^-11 of a number, a few times over.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def upstream():
    checkout = os.environ.get("DEEPSPEED_EXAMPLES")
    if not checkout:
        pytest.skip("DEEPSPEED_EXAMPLES is unset: name the folder of a DeepSpeedExamples checkout")
    path = Path(checkout) / FILE
    if not path.is_file():
        pytest.skip(f"DEEPSPEED_EXAMPLES: no {FILE} in {checkout}")
    spec = importlib.util.spec_from_file_location("upstream_reward_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RewardModel


def draw(generator, low, high):
    return int(torch.randint(low, high, (1,), generator=generator))


def twins(upstream, backbone, seed=0, leading_pads=0, compute_fp32_loss=False):
    """Ours and upstream's on one backbone, heads of one seed."""
    dtype = next(backbone.parameters()).dtype
    models = []
    for model_class in (RewardModel, upstream):
        torch.manual_seed(seed)
        models.append(model_class(backbone, TOKENIZER, leading_pads, compute_fp32_loss).to(dtype))
    return models


def step(model, input_ids, **kwargs):
    """Outputs, and the gradients of the parameters that take part, by name."""
    result = model(input_ids, **kwargs)
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(result["loss"], parameters, allow_unused=True)
    assert result.keys() == set(KEYS)
    return result | {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}


def is_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


def upstream_step(model, input_ids):
    """None where upstream asserts or gives a number that is not finite."""
    try:
        found = step(model, input_ids)
    except AssertionError:
        return None
    return found if is_finite(found) else None


def assert_equal(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, check_dtype=False)


def test_loss_scores_and_gradients_equal_in_double(upstream):
    generator = torch.Generator().manual_seed(0)
    batches = 3200
    comparable = dict.fromkeys([(kind, leading_pads) for kind in KINDS for leading_pads in (0, 1)], 0)
    for seed in range(batches):
        kind, leading_pads = list(comparable)[seed % len(comparable)]
        pairs, length = draw(generator, 1, 5), draw(generator, 2, 13)
        input_ids = random_pairs(generator, pairs, length, leading_pads, kind)
        ours, theirs = twins(upstream, TinyBackbone(), seed, leading_pads)
        found, expected = step(ours, input_ids), upstream_step(theirs, input_ids)
        assert is_finite(found), f"batch {seed}: {input_ids.tolist()}"
        if expected is not None:
            comparable[kind, leading_pads] += 1
            assert_equal(found, expected, 1e-10)
    assert sum(comparable.values()) >= 2000, comparable
    assert min(comparable.values()) >= 10, comparable
    assert comparable["noise", 0] < batches / len(comparable), "upstream fails on none of them"


def test_opt_without_its_leading_pad_is_finite_where_upstream_is_not(upstream):
    input_ids = random_pairs(torch.Generator().manual_seed(0), 3, 8, leading_pads=1)
    ours, theirs = twins(upstream, TinyBackbone(), leading_pads=0)
    assert upstream_step(theirs, input_ids) is None
    assert is_finite(step(ours, input_ids))


@pytest.mark.parametrize("fp32_loss", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_scores_and_gradients_equal_in_the_models_dtype(upstream, dtype, fp32_loss):
    generator = torch.Generator().manual_seed(0)
    comparable = 0
    for seed in range(120):
        leading_pads = seed % 2
        input_ids = random_pairs(generator, 4, 12, leading_pads, KINDS[seed // 2 % 3])
        ours, theirs = twins(upstream, TinyBackbone(dtype), seed, leading_pads, fp32_loss)
        expected = upstream_step(theirs, input_ids)
        if expected is not None:
            comparable += 1
            assert expected["chosen_mean_scores"].abs().max() < 2
            assert_equal(step(ours, input_ids), expected, TOLERANCE[dtype])
    assert comparable == 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_seed_gives_the_same_head(upstream, dtype):
    for seed in range(20):
        ours, theirs = twins(upstream, TinyBackbone(dtype), seed)
        assert torch.equal(ours.v_head.weight, theirs.v_head.weight)


def test_state_dicts_load_into_each_other(upstream):
    ours, theirs = twins(upstream, TinyBackbone())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("method", ["__init__", "forward", "forward_value"])
def test_positional_arguments_and_defaults_are_upstreams(upstream, method):
    ours, theirs = (
        [
            (parameter.name, parameter.default)
            for parameter in inspect.signature(getattr(owner, method)).parameters.values()
        ]
        for owner in (RewardModel, upstream)
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("leading_pads", [0, 1])
def test_forward_value_equals(upstream, leading_pads):
    generator = torch.Generator().manual_seed(0)
    for seed in range(300):
        rows, length = draw(generator, 1, 5), draw(generator, 3, 13)
        prompt_length = draw(generator, 2, length)
        input_ids = torch.randint(PAD - 1, VOCABULARY, (rows, length), generator=generator)
        for row in input_ids:
            row[: draw(generator, 0, prompt_length)] = PAD
            row[draw(generator, prompt_length, length + 1) :] = PAD
        ours, theirs = twins(upstream, TinyBackbone(), seed, leading_pads)
        found, expected = (model.forward_value(input_ids, prompt_length=prompt_length) for model in (ours, theirs))
        assert_equal(found, expected, 1e-10)
        values = ours.forward_value(input_ids, return_value_only=True)
        assert_equal(values, theirs.forward_value(input_ids, return_value_only=True), 1e-10)


def test_forward_value_of_an_empty_answer_equals(upstream):
    input_ids = torch.tensor([[PAD, 5, 6], [4, 5, 6]])
    ours, theirs = twins(upstream, TinyBackbone())
    expected = theirs.forward_value(input_ids, prompt_length=3)
    assert_equal(ours.forward_value(input_ids, prompt_length=3), expected, 1e-10)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
REAL = {
    "llama": (transformers.LlamaConfig(**SIZES, **TOKENS, intermediate_size=16), 0),
    "opt": (transformers.OPTConfig(**SIZES, **TOKENS, ffn_dim=16, word_embed_proj_dim=8), 1),
}


@pytest.mark.parametrize("family", REAL)
def test_real_backbone_equals(upstream, family):
    config, leading_pads = REAL[family]
    torch.manual_seed(0)
    backbone = transformers.AutoModel.from_config(config).double().eval()
    ours, theirs = twins(upstream, backbone, leading_pads=leading_pads)
    generator = torch.Generator().manual_seed(0)
    for seed in range(30):
        input_ids = random_pairs(generator, 3, 10, leading_pads, KINDS[seed % 3])
        mask = input_ids != PAD
        mask[:, :leading_pads] = True
        try:
            expected = step(theirs, input_ids, attention_mask=mask, use_cache=False)
        except TypeError as error:
            if "head_mask" not in str(error):
                raise
            pytest.skip(f"upstream passes head_mask, which this {family} refuses: {error}")
        assert is_finite(expected)
        assert_equal(step(ours, input_ids, attention_mask=mask, use_cache=False), expected, 1e-10)
