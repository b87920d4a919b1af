# SPDX-License-Identifier: Apache-2.0
"""What a loss takes from hidden states, against slow references, and real trainings with each flag."""

import json
import math
from types import SimpleNamespace

import models
import pytest
import runs
import torch
from flags import loss_of
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.batching.merging import merge
from reward_model.common.errors import UserError
from reward_model.config.groups import TrainingConfig
from reward_model.config.options import parse
from reward_model.config.settings import resolve
from reward_model.data.comparisons import Comparison
from reward_model.models import attention_choice, language_head
from reward_model.models.forward import ForwardPass
from reward_model.models.language_head import keep_language_head
from reward_model.models.loading import load_for_training
from reward_model.models.scorer import head_layer, resize_embedding
from reward_model.objectives import terms
from reward_model.objectives.objective import Objective
from reward_model.training.engine import parameter_groups
from reward_model.training.meta import MetaStep
from reward_model.training.resume import differences

PAD, H = 0, 5
LAYOUTS = [Layout(kind, PAD) for kind in ("packed", "shared", "separate", "unpadded")]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """This process has no group; its sums are those of all ranks."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logistic(gap):
    return math.log(1 + math.exp(-gap))


def distance(one, other):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one.tolist(), other.tolist())))


def cosine(one, other):
    one, other = one.tolist(), other.tolist()
    return sum(a * b for a, b in zip(one, other)) / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


# Section 1: weights and margins of pairs


def test_a_pair_weighs_by_the_mean_distance_over_its_own():
    chosen, rejected = drawn(7, H), drawn(7, H, seed=1)
    found = terms.norm_weights(terms.distances(chosen, rejected), 2.5)
    expected = [2.5 / (distance(c, r) + 1e-6) for c, r in zip(chosen, rejected)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert terms.norm_weights(torch.tensor([2.0]), 2.0).item() == pytest.approx(1.0, abs=1e-6)


def test_equal_and_very_close_states_weigh_ten_at_most():
    found = terms.norm_weights(torch.tensor([0.0, 0.19, 0.21]), 2.0)
    assert found.tolist() == pytest.approx([10, 10, 2 / 0.21], rel=1e-5)


@pytest.mark.parametrize(
    ("other", "margin"), [([1.0, 0.0], 1.0), ([3.0, 0.0], 1.0), ([0.0, 2.0], 0.0), ([-1.0, 0.0], 0.0),
                          ([1.0, math.sqrt(3)], 1 / 3), ([1.0, 1.0], 1 / 2)],
)  # fmt: skip
def test_the_margin_of_two_states_by_their_angle(other, margin):
    found = terms.similarity_margin(torch.tensor([[1.0, 0.0]]), torch.tensor([other]), scale=0.8)
    assert found.item() == pytest.approx(0.8 * margin, abs=1e-3)  # float32: arccos near 1 has half of its digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_margins_are_float32_and_have_no_gradient(dtype):
    chosen, rejected = (drawn(4, H, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    weights = terms.norm_weights(terms.distances(chosen, rejected), 1.0)
    for found in (weights, terms.similarity_margin(chosen, rejected)):
        assert found.dtype == torch.float32
        assert not found.requires_grad


def rows(seed=0, count=6):
    """Pairs of two prompts and few texts, so that they merge and a text comes in several of them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        one, other = torch.randperm(5, generator=generator)[:2].tolist()
        texts = [[3 + k, *([9] * (k % 3)), 8] for k in (one, other)]
        made.append(Comparison([1 + i % 2, 7], texts, [0], [1], [math.nan], i % 2))
    return made


def state_of(text):
    return drawn(H, seed=int("".join(map(str, text))))


def collated(made, layout):
    """A batch, the score and the state of each of its responses, and row by row where those of its two are."""
    batch = collate(made, layout)
    texts = [(*m.texts.prompt, *response) for m in merge(made, layout) for response in m.texts.responses]
    states = torch.stack([state_of(text) for text in texts])
    places = {text: i for i, text in enumerate(texts)}  # a text that stands there twice has the same state
    own = [[places[(*row.prompt, *response)] for response in row.responses] for row in made]
    return batch, states.sum(1).requires_grad_(), states.clone().requires_grad_(), own


@layouts
def test_the_loss_of_a_batch_is_the_mean_of_weighed_losses(layout):
    made = rows()
    batch, scores, states, own = collated(made, layout)
    objective = Objective(loss_of("--pair_weight norm"))
    objective.distance.mean = torch.tensor(2.0, dtype=torch.float64)
    losses = [2 / (distance(states[c], states[r]) + 1e-6) * logistic((scores[c] - scores[r]).item()) for c, r in own]
    found = objective(batch, scores, states=states)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    found.backward()
    assert states.grad is None


@layouts
def test_the_loss_of_a_batch_has_the_margin_of_each_pair(layout):
    made = rows(seed=3)
    batch, scores, states, own = collated(made, layout)
    objective = Objective(loss_of("--margin similarity --margin_scale 2"))

    def margin(c, r):
        return 2 * (1 - 2 / math.pi * math.acos(min(1, max(0, cosine(states[c], states[r])))))

    losses = [logistic((scores[c] - scores[r]).item() - margin(c, r)) for c, r in own]
    assert objective(batch, scores, states=states).item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_without_the_flags_the_states_change_nothing():
    batch, scores, states, _ = collated(rows(), LAYOUTS[0])
    plain = Objective(loss_of(""))
    assert plain.distance is None
    assert torch.equal(plain(batch, scores), plain(batch, scores, states=states))


def test_the_running_mean_is_that_of_whole_steps():
    """However a step is divided: μ begins with the first step's mean and moves a tenth of the way to each next one."""
    steps = [rows(seed) for seed in range(3)]
    means = []
    for made in steps:
        _, _, states, own = collated(made, LAYOUTS[0])
        means.append(sum(distance(states[c], states[r]) for c, r in own) / len(own))
    expected = 0.9 * (0.9 * means[0] + 0.1 * means[1]) + 0.1 * means[2]
    whole, parts = terms.RunningDistance(), terms.RunningDistance()
    for made in steps:
        batch, _, states, own = collated(made, LAYOUTS[0])
        whole.add(batch.pairs, states, 1.0)
        whole.end_step()
        for part in (made[:1], made[1:]):
            batch, _, states, _ = collated(part, LAYOUTS[2])
            parts.add(batch.pairs, states, len(part) / len(made))
        parts.end_step()
    assert whole.state() == pytest.approx(expected, rel=1e-9)
    assert parts.state() == pytest.approx(expected, rel=1e-6)


def test_a_step_without_a_finite_mean_changes_nothing_and_the_state_comes_back_to_the_bit():
    batch, _, states, _ = collated(rows(), LAYOUTS[0])
    running = terms.RunningDistance()
    assert running.state() is None
    for each in (states * math.nan, states, states * math.inf):
        running.add(batch.pairs, each, 1.0)
        running.end_step()
    expected = terms.RunningDistance()
    expected.add(batch.pairs, states, 1.0)
    expected.end_step()
    assert running.state() == expected.state()
    again = terms.RunningDistance()
    again.restore(running.state(), CPU)
    assert torch.equal(again.mean, running.mean)


# Section 2: the contrastive term


def slow_contrastive(one, other, temperature, names=None):
    losses = []
    for i in range(len(one)):
        rest = [j for j in range(len(other)) if j == i or names is None or names[j] != names[i]]
        parts = {j: math.exp(cosine(one[i], other[j]) / temperature) for j in rest}
        losses.append(-math.log(parts[i] / sum(parts.values())))
    return losses


@pytest.mark.parametrize(("temperature", "names"), [(0.05, None), (1.0, None), (0.5, [0, 1, 2, 0, 4, 1])])
def test_each_vector_is_told_from_all_of_another_name(temperature, names):
    one, other = drawn(6, H), drawn(6, H, seed=1)
    found = terms.contrastive_loss(one, other, temperature, names and torch.tensor(names))
    assert found.tolist() == pytest.approx(slow_contrastive(one, other, temperature, names), rel=1e-9)


def test_the_limits_of_the_contrastive_term():
    one = drawn(4, H, dtype=torch.float32)
    assert terms.contrastive_loss(one[:1], one[1:2]).item() == 0
    equal = one[:1].expand(4, H)
    assert terms.contrastive_loss(equal, equal).tolist() == pytest.approx([math.log(4)] * 4)
    assert terms.contrastive_loss(torch.eye(4), torch.eye(4)).max().item() < 1e-7  # at 0.05: e^-20 of each other one
    assert terms.contrastive_loss(one, 7 * one).tolist() == pytest.approx(terms.contrastive_loss(one, one).tolist())


def test_the_gradient_of_the_contrastive_term_goes_through_both_views():
    one, other = (drawn(4, 3, seed=seed).requires_grad_() for seed in (0, 1))
    names = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda a, b: terms.contrastive_loss(a, b, 0.5, names), (one, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_contrastive_term_is_finite_in_half_precision(dtype):
    one = (drawn(5, H) * 1e3).to(dtype).requires_grad_()
    found = terms.contrastive_loss(one, one.detach(), 0.01)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert one.grad.isfinite().all()


def texts_of(made, layout):
    return [(*m.texts.prompt, *response) for m in merge(made, layout) for response in m.texts.responses]


@layouts
def test_texts_have_equal_names_where_they_are_equal(layout):
    """Prompts that differ, answers that differ in order alone, and texts that no merging brings together."""
    made = [*rows(count=9), Comparison([], [[1, 7, 3, 8], [7, 1, 3, 8]], [0], [1]), Comparison([9], [[7, 3, 8], [1]])]
    batch, texts = collate(made, layout), texts_of(made, layout)
    names = batch.tokens.text_names().tolist()
    assert len(set(texts)) < len(texts)
    assert len(set(names)) == len(set(texts)) == len(set(zip(texts, names)))


@layouts
def test_the_term_of_a_batch_is_of_its_responses_or_of_the_differences_of_its_pairs(layout):
    made = [*rows(), rows()[0]]  # the first pair was judged twice
    batch, _, states, _ = collated(made, layout)
    texts = texts_of(made, layout)
    other = states.detach() + 0.5 * drawn(*states.shape, seed=9)
    objective = Objective(loss_of("--contrastive_weight 1 --contrastive_temperature 0.2"))
    expected = slow_contrastive(states, other, 0.2, texts)
    assert objective.contrastive(batch, states, other).item() == pytest.approx(sum(expected) / len(states), rel=1e-9)
    flags = "--contrastive_weight 1 --contrastive_temperature 0.2 --contrastive difference"
    pairs = list(zip(batch.pairs.better.tolist(), batch.pairs.worse.tolist()))
    one, two = ([each[c] - each[r] for c, r in pairs] for each in (states, other))
    one, two = torch.stack([*one, *(-v for v in one)]), torch.stack([*two, *(-v for v in two)])
    names = [(texts[c], texts[r]) for c, r in [*pairs, *(pair[::-1] for pair in pairs)]]
    assert len(set(names)) < len(names)
    expected = slow_contrastive(one, two, 0.2, names)
    found = Objective(loss_of(flags)).contrastive(batch, states, other)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_views_want_dropout(family, tmp_path):
    tokenizer = models.write(family, tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, 0)
    scorer.keeps_states = True
    forward = ForwardPass(scorer, scorer, torch.float32, CPU, tokenizer.pad_token_id)
    before = torch.get_rng_state()
    if family == "gpt2":
        forward.require_two_views(tokenizer.eos_token_id)
    else:
        with pytest.raises(UserError, match=r"two passes of LlamaModel give equal states.*--dropout") as caught:
            forward.require_two_views(tokenizer.eos_token_id)
        assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


# Section 3: the states that a model gives


@pytest.mark.parametrize(("family", "pooling"), [("opt", None), ("gpt2", "mean"), ("bert", None), ("roberta", None)])
def test_the_states_are_what_the_head_is_given(family, pooling, tmp_path):
    tokenizer = models.write(family, tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, 0, pooling).eval()
    forward = ForwardPass(scorer, scorer, torch.float32, CPU, tokenizer.pad_token_id)
    batch = collate(rows(), forward.layout)
    plain = forward(batch, batch.tokens.ends)
    assert forward.states is None
    scorer.keeps_states = True
    assert torch.equal(forward(batch, batch.tokens.ends), plain)
    assert len(forward.states) == len(batch.tokens.ends)
    assert torch.equal(head_layer(scorer)(forward.states).squeeze(-1), plain)


# Section 4: a language model's loss of chosen answers


def asked(prompt, answers, shared=0, better=(0,), worse=(1,)):
    """A row whose prompt has so many tokens of the answers, as they have them in common."""
    count = len(prompt) - shared
    row = Comparison(prompt, answers, list(better), list(worse), [math.nan] * len(better), prompt_tokens=count)
    assert row.asked == count
    return row


ANSWERS = [
    asked([11, 12, 13], [[21, 22, 3], [23, 3]]),
    asked([11, 12, 13, 21], [[24, 25, 3], [26, 3]], shared=1),  # all answers begin with 21
    asked([14], [[27, 3], [28, 29, 30, 3], [31, 3]], better=(1, 1, 0), worse=(0, 2, 2)),
    asked([], [[32, 33, 3], [34, 3]]),
    asked([15, 16], [[3], [35, 3]]),
]


def slow_answers(row, k):
    """Of an answer each token that something is before, and the text before it."""
    text = [*row.prompt, *row.responses[k]]
    return [(tuple(text[:i]), text[i]) for i in range(max(1, row.asked), len(text))]


@layouts
def test_the_tokens_of_chosen_answers_and_what_they_weigh(layout):
    """By the texts before them: whatever stands where, each answer's tokens share what its pairs weigh."""
    batch = collate(ANSWERS, layout)
    found = terms.chosen_tokens(batch)
    expected, weights = {}, iter(batch.pairs.weights.tolist())
    for row in ANSWERS:
        for k in row.better:
            tokens, weight = slow_answers(row, k), next(weights)
            for token in tokens:
                expected[token] = expected.get(token, 0) + weight / len(tokens)
    flat, width = batch.tokens.input_ids.flatten().tolist(), batch.tokens.input_ids.shape[1]
    begin, end = batch.tokens.prompt_begin.flatten().tolist(), batch.tokens.prompt_end.flatten().tolist()
    own = batch.tokens.begin.flatten().tolist()
    got = {}
    for before, token, weight in zip(*(each.tolist() for each in found)):
        row = before // width * width
        prompt = flat[row + begin[before] : row + end[before]] if end[before] > begin[before] else []
        key = (*prompt, *flat[row + own[before] : before + 1]), token
        got[key] = got.get(key, 0) + weight
    assert got == pytest.approx(expected, rel=1e-6)
    assert sum(got.values()) == pytest.approx(1, rel=1e-6)


def test_a_batch_without_pairs_has_one_token_that_weighs_nothing():
    for made in ([Comparison([1], [[2]], targets=[1.0])], [asked([], [[3], [4]])]):
        found = terms.chosen_tokens(collate(made, LAYOUTS[0]))
        assert [len(each) for each in found] == [1, 1, 1]
        assert found.weights.tolist() == [0]


LANGUAGE_MODELS = ["gpt2", "opt", "llama", "gpt_neox"]  # the embedding again, one of fewer units, and two of their own


def likelihood(model, rows):
    """The mean over pairs of an answer's mean loss, each text by itself through a language model of Transformers."""
    losses = []
    for row in rows:
        for k in row.better:
            text = [*row.prompt, *row.responses[k]]
            logs = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
            own = [-logs[i - 1, text[i]] for i in range(max(1, row.asked), len(text))]
            losses.append(sum(own) / len(own))
    return sum(losses) / len(losses)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(attention_choice, "first_text", lambda text: text)
    monkeypatch.setattr(attention_choice, "largest", lambda value: value)


@pytest.mark.parametrize("attention", ["separate", "slices"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_language_head_is_that_of_transformers(family, attention, tmp_path, one_rank, monkeypatch):
    """Values and gradients, in separate rows and with shared prompts."""
    tokenizer = models.write(family, tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, 0).eval()
    keep_language_head(scorer, str(tmp_path), trains=True)
    monkeypatch.setattr(language_head, "LOGITS", 3 * models.VOCABULARY)  # three tokens at a time
    forward = ForwardPass(scorer, scorer, torch.float32, CPU, tokenizer.pad_token_id)
    forward.choose_attention(16, attention)
    scorer.eval()
    batch = collate(ANSWERS, forward.layout)
    answers = terms.chosen_tokens(batch)
    plain = forward(batch, batch.tokens.ends)
    assert forward.token_losses is None
    assert torch.equal(forward(batch, batch.tokens.ends, followed_by=(answers.before, answers.ids)), plain)
    loss = (forward.token_losses * answers.weights).sum()
    loss.backward()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = likelihood(whole, ANSWERS)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = {name: each.grad for name, each in scorer.backbone.named_parameters() if each.grad is not None}
    theirs = {name: each.grad for name, each in whole.base_model.named_parameters()}
    assert len(ours) > 5
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=2e-5), name
    if family in ("llama", "gpt_neox"):
        own = whole.get_output_embeddings().weight.grad
        assert torch.allclose(scorer.language_head.weight.grad, own, atol=1e-5)
    else:
        assert scorer.language_head.weight is scorer.backbone.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_tokens_that_were_added_have_rows_and_a_frozen_head_stays_frozen(family, tmp_path):
    models.write(family, tmp_path)
    scorer = load_for_training(str(tmp_path), torch.bfloat16, 0)
    resize_embedding(scorer, models.VOCABULARY + 3)
    keep_language_head(scorer, str(tmp_path), trains=False)
    head = scorer.language_head
    assert head.weight.shape[0] == models.VOCABULARY + 8
    assert head.weight.dtype == torch.bfloat16
    assert head.weight.requires_grad is (family == "opt")  # the embedding's
    losses = head(torch.zeros(2, head.weight.shape[1], dtype=torch.bfloat16), torch.tensor([0, models.VOCABULARY + 2]))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log(models.VOCABULARY + 8)] * 2, rel=1e-3)


def refused_head(folder, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    scorer = load_for_training(str(folder), torch.float32, 0)
    with pytest.raises(UserError) as caught:
        keep_language_head(scorer, str(folder), trains=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_without_a_language_head_are_refused(tmp_path):
    for family in ("bert", "gemma2", "llama"):
        models.write(family, tmp_path / family)
    assert "only a decoder" in refused_head(tmp_path / "bert")
    assert "changes its logits by final_logit_softcapping 30.0" in refused_head(tmp_path / "gemma2")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    saved.model.save_pretrained(tmp_path / "llama")  # without lm_head
    assert "has no language-model head (lm_head.weight)" in refused_head(tmp_path / "llama")
    models.write("llama", tmp_path / "rm")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    found.save_pretrained(tmp_path / "rm")
    assert "is a reward model, which has lost its language-model head" in refused_head(tmp_path / "rm")


def test_a_head_of_its_own_learns_at_the_rate_of_the_model(tmp_path):
    models.write("llama", tmp_path)
    scorer = load_for_training(str(tmp_path), torch.float32, 0)
    keep_language_head(scorer, str(tmp_path), trains=True)
    groups = parameter_groups(scorer, TrainingConfig(learning_rate=1e-5, head_learning_rate=1e-3))
    rates = {id(each): group["lr"] for group in groups for each in group["params"]}
    assert rates[id(scorer.language_head.weight)] == 1e-5
    assert rates[id(head_layer(scorer).weight)] == 1e-3


# Section 5: weights that move towards shifted texts, and come back


def slow_difference(scores):
    k = len(scores)
    pairs = [(a, b) for i, a in enumerate(scores) for b in scores[i + 1 :]]
    return 2 / k**2 * sum(1 / (1 + math.exp(-abs(a - b))) for a, b in pairs)


def test_how_far_answers_are_told_apart():
    scores, rows = [0.3, -1.2, 5.0, 2.0, 2.0, 7.0], [0, 0, 0, 2, 2, 1]
    found = terms.difference_loss(torch.tensor(scores, dtype=torch.float64), torch.tensor(rows), 3)
    assert found.tolist() == pytest.approx([slow_difference(scores[:3]), 0, 0.25], rel=1e-9)  # (k - 1)/(2k) at k = 2
    same = drawn(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: terms.difference_loss(s, torch.tensor([0, 0, 0, 0, 1, 1]), 2), same)


SHIFTED = [Comparison([40 + i], [[41 + i, 3], [50 + i, 51, 3], [60, 3]][: 2 + i % 2]) for i in range(5)]


def meta_step(scorer, pad, rate=0.5, prompts=3, rank=0, world_size=1):
    forward = ForwardPass(scorer, scorer, torch.float32, CPU, pad)
    context = SimpleNamespace(device=CPU, rank=rank, world_size=world_size)
    return MetaStep(SHIFTED, forward, context, rate, prompts, seed=7)


@pytest.fixture
def tiny_scorer(tmp_path):
    tokenizer = models.write("llama", tmp_path)
    return load_for_training(str(tmp_path), torch.float32, 0).train(), tokenizer.pad_token_id


def moved_by_hand(scorer, rows, rate):
    """θ + η ∇J by torch.func, each text scored alone by its own call of the model, from the formula."""
    weights = {name: each.detach().clone() for name, each in scorer.named_parameters()}

    def difference(values):
        total = torch.zeros(())
        for row in rows:
            scores = []
            for answer in row.responses:
                ids = torch.tensor([[*row.prompt, *answer]])
                given = ids, torch.ones_like(ids), torch.tensor([ids.shape[1] - 1])
                scores.append(torch.func.functional_call(scorer, values, given)[0])
            for i, one in enumerate(scores):
                for other in scores[i + 1 :]:
                    total = total + torch.sigmoid((one - other).abs()) * 2 / len(scores) ** 2
        return total / len(rows)

    gradients, value = torch.func.grad_and_value(difference)(weights)
    return {name: weights[name] + rate * gradients[name] for name in weights}, value.item()


def test_the_gradient_is_taken_where_the_formula_says_and_the_weights_come_back(tiny_scorer):
    scorer, pad = tiny_scorer
    meta = meta_step(scorer, pad)
    before = {name: each.detach().clone() for name, each in scorer.named_parameters()}
    expected, value = moved_by_hand(scorer, [SHIFTED[i] for i in meta.rows_of(4)], 0.5)
    assert meta.ascend(4).item() == pytest.approx(value, rel=1e-5)
    assert all(each.grad is None for each in scorer.parameters())
    largest = 0.0
    for name, each in scorer.named_parameters():
        assert torch.allclose(each, expected[name], atol=1e-6), name
        largest = max(largest, (each - before[name]).abs().max().item())
    assert largest > 1e-3
    batch = collate(rows(), meta.forward.layout)
    loss = Objective(loss_of(""))(batch, meta.forward(batch, batch.tokens.ends))
    loss.backward()

    def by_hand(values):
        tokens = batch.tokens
        given = tokens.input_ids, tokens.attention_mask, tokens.ends
        return Objective(loss_of(""))(batch, torch.func.functional_call(scorer, values, given))

    gradients = torch.func.grad(by_hand)(expected)
    for name, each in scorer.named_parameters():
        assert torch.allclose(each.grad, gradients[name], atol=1e-6), name
    meta.come_back()
    for name, each in scorer.named_parameters():
        assert torch.equal(each, before[name]), name


def test_two_ranks_move_as_one(tiny_scorer, monkeypatch):
    """Each has a part of the rows, and they add up their gradients."""
    scorer, pad = tiny_scorer
    one = meta_step(scorer, pad)
    value = one.ascend(0).item()
    expected = [each.detach().clone() for each in scorer.parameters()]
    one.come_back()
    parts, summed = [], []
    for rank in range(2):
        mine = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, mine=mine: mine.append(tensor.clone()))
        part = meta_step(scorer, pad, rank=rank, world_size=2)
        summed.append(part.ascend(0).item())
        part.come_back()
        parts.append(mine)
    assert sum(summed) == pytest.approx(value, rel=1e-5)
    for each, whole, (first, second) in zip(scorer.parameters(), expected, zip(*parts)):
        assert torch.allclose(each + 0.5 * (first + second), whole, atol=1e-6)


def test_a_rank_without_rows_takes_part(tiny_scorer, caplog):
    scorer, pad = tiny_scorer
    caplog.set_level("INFO", "reward_model")
    alone = meta_step(scorer, pad, prompts=1, rank=1, world_size=2)
    assert alone.ascend(0).item() == 0
    assert len(alone.kept) == len(list(scorer.parameters()))
    alone.come_back()
    assert "no weight has a gradient" in caplog.text


@pytest.mark.parametrize(("rate", "said"), [(1e-12, "rounded back in float32: raise --meta_rate"), (1.0, "moved")])
def test_how_many_weights_move_is_said_once(rate, said, tiny_scorer, caplog):
    scorer, pad = tiny_scorer
    caplog.set_level("INFO", "reward_model")
    meta = meta_step(scorer, pad, rate)
    for step in range(2):
        meta.ascend(step)
        meta.come_back()
    assert said in caplog.text
    assert caplog.text.count("of the weights with a gradient moved") == 1
    assert ("rounded back" in caplog.text) is (rate < 1)


def test_every_shifted_text_comes_once_before_any_comes_again():
    meta = MetaStep(SHIFTED, None, None, 1.0, 2, seed=7)
    drawn_rows = [row for step in range(10) for row in meta.rows_of(step)]
    passes = [drawn_rows[i : i + 5] for i in range(0, 20, 5)]
    assert [sorted(each) for each in passes] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(each) for each in passes}) > 1
    assert MetaStep(SHIFTED, None, None, 1.0, 9, seed=7).prompts == 5


# Section 6: what does not go together

REFUSED = [
    ("--pair_weight cosine", ["--pair_weight", "cosine", "norm"]),
    ("--pair_weight norm --loss rank_list", ["--pair_weight is of pairs", "rank_list"]),
    ("--pair_weight norm --loss_level token", ["--pair_weight", "--loss_level token"]),
    ("--margin similarity --loss_level token", ["--margin similarity", "--loss_level token"]),
    ("--margin similarity --loss focal", ["--margin", "logistic, scaled, hinge", "focal"]),
    ("--margin similarity --loss scaled", ["--loss scaled", "--margin column"]),
    ("--margin_scale 2", ["--margin_scale", "--margin similarity"]),
    ("--margin 1 --margin_scale 2", ["--margin_scale", "--margin similarity"]),
    ("--margin similarity --margin_scale 0", ["--margin_scale 0", "above"]),
    ("--contrastive_weight -1", ["--contrastive_weight", "-1"]),
    ("--contrastive_weight 1 --contrastive_temperature 0", ["--contrastive_temperature", "0"]),
    ("--contrastive difference", ["--contrastive without --contrastive_weight"]),
    ("--contrastive_temperature 0.1", ["--contrastive_temperature without --contrastive_weight"]),
    ("--contrastive_weight 1 --loss mse", ["--contrastive_weight", "mse"]),
    ("--contrastive_weight 1 --loss_level token", ["--contrastive_weight", "--loss_level token"]),
    ("--sft_weight 1", ["--sft_weight 1", "[0, 1)"]),
    ("--sft_weight -0.1", ["--sft_weight", "-0.1"]),
    ("--sft_weight 0.01 --loss mse", ["--sft_weight", "mse"]),
    ("--sft_weight 0.01 --loss_level token", ["--sft_weight", "--loss_level token"]),
    ("--sft_weight 0.01 --pooling mean", ["--sft_weight", "--pooling mean"]),
    ("--sft_weight 0.01 --sequence_parallel_size 2", ["--sft_weight", "--sequence_parallel_size"]),
    ("--meta_rate 0.1", ["--meta_rate without --meta_data"]),
    ("--meta_batch_size 8", ["--meta_batch_size without --meta_data"]),
    ("--meta_data x --meta_rate 0", ["--meta_rate", "0"]),
    ("--meta_data x --compile", ["--meta_data and --compile"]),
    ("--meta_data x --sequence_parallel_size 2", ["--meta_data and --sequence_parallel_size"]),
    ("--pair_weight norm --sequence_parallel_size 2", ["--pair_weight", "--sequence_parallel_size"]),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_does_not_go_together_is_one_line_that_names_it(line, words):
    with pytest.raises(UserError) as caught:
        parse(["--model_name_or_path", "none", *line.split()])
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--contrastive_weight 1 --per_device_train_batch_size 1",
            "--contrastive_weight and --per_device_train_batch_size 1: one pair has no other",
        ),
        (
            "--contrastive_weight 1 --zero_stage 3 --gradient_checkpointing",
            "--gradient_checkpointing at ZeRO stage 3: .* take --zero_stage 2",
        ),
        ("--meta_data x --zero_stage 3", "--meta_data at ZeRO stage 3: .* take --zero_stage 2"),
        ("--meta_data x --dtype fp16", "--meta_data and --dtype fp16: .* take --dtype fp32, or bf16"),
    ],
)
def test_what_does_not_go_with_what_the_deepspeed_file_may_say(line, words):
    config = parse(["--model_name_or_path", "none", *line.split()])
    with pytest.raises(UserError, match=words) as caught:
        resolve(config, "fp32", 1, 64, 100)
    assert "\n" not in str(caught.value)


def test_a_run_from_before_these_flags_is_the_same_without_them_and_another_with_them():
    def described(line):
        settings = resolve(parse(["--model_name_or_path", "none", *line.split()]), "fp32", 1, 64, 100)
        return json.loads(settings.to_json({}))

    plain = described("")
    new = {"margin_scale", "pair_weight", "contrastive_weight", "contrastive", "contrastive_temperature", "sft_weight"}
    new |= {"meta_data", "meta_rate", "meta_batch_size"}
    assert new <= set(plain)
    before = {name: value for name, value in plain.items() if name not in new}
    assert differences(before, plain) == []
    for line in ("--pair_weight norm", "--margin similarity", "--contrastive_weight 1", "--sft_weight 0.01"):
        assert differences(before, described(line)), line
    content = {"content": {"train": "a", "meta": "b"}}
    (found,) = differences(before | {"content": {"train": "a"}}, plain | content)
    assert found.startswith("the rows of --meta_data (by content")


# Section 7: real trainings; that they go on to the byte is in test_checkpoints.py

OTHER_WAYS = [
    (1, ["--gradient_accumulation_steps", 4, "--per_device_train_batch_size", 4, "--merge", "prompt"]),
    (2, ["--per_device_train_batch_size", 8, "--zero_stage", 3]),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--pair_weight norm", "--margin similarity --margin_scale 0.5"])
def test_a_training_is_the_same_however_a_step_is_divided(flags, demo, tmp_path):
    flags = [*flags.split(), "--max_steps", 6, "--max_grad_norm", 0]
    same = runs.train(demo, tmp_path / "one", *flags, "--merge", "prompt")
    plain = runs.train(demo, tmp_path / "plain", "--max_steps", 6, "--max_grad_norm", 0, "--merge", "prompt")
    assert abs(same.losses[0] - plain.losses[0]) > 1e-3  # the flag does something
    assert same.final["accuracy"] > 0.5
    for processes, others in OTHER_WAYS[:1]:
        other = runs.train(demo, tmp_path / f"{processes}", *flags, *others, processes=processes)
        assert other.losses == pytest.approx(same.losses, abs=2e-5)
    apart = runs.train(demo, tmp_path / "apart", *flags)
    processes, others = OTHER_WAYS[1]
    other = runs.train(demo, tmp_path / "two", *flags, *others, processes=processes)
    assert other.losses == pytest.approx(apart.losses, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["states", "difference"])
def test_a_training_with_the_contrastive_term(what, demo, tmp_path):
    flags = ["--contrastive_weight", 0.5, "--contrastive", what, "--dropout", 0.1, "--max_steps", 6]
    nothing = ["--data_path", demo / "none", "--contrastive_weight", 1]
    refused = runs.launch("--model_name_or_path", demo / "model", *nothing)
    assert refused.returncode == 1
    assert "leaves no dropout" in refused.stdout + refused.stderr  # before the data is looked for
    one = runs.train(demo, tmp_path / "one", *flags)
    assert "each response is told from the others of one forward pass of one process" in one.output
    again = runs.train(demo, tmp_path / "again", *flags, "--merge", "batch")
    assert again.losses == one.losses  # the masks follow from the seed
    two = ["--per_device_train_batch_size", 8, "--zero_stage"]
    others = [
        runs.train(demo, tmp_path / "three", *flags, *two, 3, processes=2),
        runs.train(demo, tmp_path / "two", *flags, *two, 2, "--gradient_checkpointing", processes=2),
    ]
    assert others[0].losses == pytest.approx(others[1].losses, abs=2e-5)  # the masks are those of the ranks
    for each in (one, *others):
        assert each.losses[-1] < each.losses[0]


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def with_language_head(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "out"
    return runs.train(demo, folder, *SFT), folder


SFT = ["--sft_weight", 0.2, "--max_steps", 6, "--max_grad_norm", 0]
WAYS = [
    (2, ["--zero_stage", 3, "--per_device_train_batch_size", 8, "--gradient_checkpointing"]),
    (2, ["--zero_stage", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]),
    (1, ["--zero_stage", 2, "--attention", "separate"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), WAYS)
def test_a_language_head_learns_the_same_in_every_way(processes, flags, with_language_head, demo, tmp_path):
    one, folder = with_language_head
    plain = runs.train(demo, tmp_path / "plain", *SFT[2:])
    assert "language-model head: lm_head" in one.output
    assert one.losses[0] > plain.losses[0] + 0.5  # log 1024 of a new model's, against log 2
    assert one.losses[-1] < one.losses[0]
    other = runs.train(demo, tmp_path / "other", *SFT, *flags, processes=processes)
    assert other.losses == pytest.approx(one.losses, abs=5e-5)
    assert names_in(tmp_path / "other") == names_in(folder) == names_in(tmp_path / "plain")


@pytest.mark.slow
def test_a_training_with_the_language_head_of_the_embedding_and_with_adapters(demo, tmp_path):
    """Tied in GPT-2, whose gradient has two sources; and frozen beside LoRA."""
    folder = tmp_path / "tied"
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    start = ["--model_name_or_path", folder]
    one = runs.train(demo, tmp_path / "one", *start, *SFT, "--dropout", 0)
    assert "language-model head: lm_head, the input embedding" in one.output
    for stage in (2, 3):
        flags = ["--zero_stage", stage, "--per_device_train_batch_size", 8, "--dropout", 0]
        two = runs.train(demo, tmp_path / f"{stage}", *start, *SFT, *flags, processes=2)
        assert two.losses == pytest.approx(one.losses, abs=5e-5)
    adapters = runs.train(demo, tmp_path / "lora", *SFT, "--lora_dim", 8, "--lora_learning_rate", 5e-3)
    assert "parameters, frozen" in adapters.output
    assert adapters.losses[-1] < adapters.losses[0]


@pytest.mark.slow
def test_a_training_with_shifted_texts(demo, tmp_path):
    """The same in every way; and at a rate that moves nothing, the plain training."""
    shifted = [json.loads(line) for line in (demo / "data" / "eval.jsonl").read_text().splitlines()[:12]]
    lists = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in shifted]
    (tmp_path / "shifted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    base = ["--max_steps", 6, "--max_grad_norm", 0]
    flags = [*base, "--meta_data", tmp_path / "shifted.jsonl", "--meta_batch_size", 4, "--meta_rate", 0.5]
    plain = runs.train(demo, tmp_path / "plain", *base)
    one = runs.train(demo, tmp_path / "one", *flags)
    assert "--meta_data: 12 prompts, 4 in a step, rate 0.5" in one.output
    assert abs(one.losses[0] - plain.losses[0]) > 1e-4
    assert all(0.25 <= step["meta_difference"] < 0.5 for step in one.train)
    assert "meta_difference" not in plain.train[0]
    half = ["--per_device_train_batch_size", 8]
    for stage in (1, 2):
        flags_of = [*flags, *half, "--zero_stage", stage]
        two = runs.train(demo, tmp_path / f"{stage}", *flags_of, processes=2)
        assert two.losses == pytest.approx(one.losses, abs=5e-5)
        found = [step["meta_difference"] for step in two.train]
        assert found == pytest.approx([step["meta_difference"] for step in one.train], abs=1e-5)
    apart = runs.train(demo, tmp_path / "parts", *flags, *half, "--gradient_accumulation_steps", 2)
    assert apart.losses == pytest.approx(one.losses, abs=5e-5)
    still = runs.train(demo, tmp_path / "still", *flags[:-1], 1e-30)
    assert still.losses == plain.losses  # what moves nothing changes no bit
