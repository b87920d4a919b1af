# SPDX-License-Identifier: Apache-2.0
"""Several score heads: what each draws and learns, their mean wherever it is loaded, and what their spread says."""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import models
import numpy as np
import pytest
import runs
import torch
from comparisons import table
from flags import loss_of
from safetensors.torch import load_file, save_file
from saved import save
from server import Running
from transformers import AutoModelForSequenceClassification

from reward_model.__main__ import main
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.batching.planner import Planner
from reward_model.common.errors import UserError
from reward_model.config.groups import BatchConfig
from reward_model.config.options import parse
from reward_model.config.scoring import ScoreConfig, ServeConfig
from reward_model.data.comparisons import Comparison
from reward_model.evaluation.bounds import bounds, lower_bound_error
from reward_model.evaluation.judged import Judged
from reward_model.inference import load, load_to_read
from reward_model.models import adapters
from reward_model.models.loading import load_for_training
from reward_model.models.many_heads import FILE, FOLDER, drawn
from reward_model.models.scorer import head_layer
from reward_model.objectives.bootstrap import Bootstrap
from reward_model.objectives.objective import Objective
from reward_model.serving import stream
from reward_model.serving.api import serve
from reward_model.training.resume import differences, hash_of_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = (["2 + 2 =", "Where is the cat? ", "x"], [" 4", "On the mat.", " y"])
PACKED = Layout("packed", pad=0)

# --- what a row is known by, and what heads draw ---

ROWS = [
    Comparison([1, 2], [[3], [4, 5]], [0], [1], prompt_hash=7),
    Comparison([1, 2], [[4, 5], [6]], [0], [1], prompt_hash=7),
    Comparison([1], [[8], [9], [2]], [0, 0, 1], [1, 2, 2], ranks=[0, 1, 2]),
    Comparison([5], [[6, 7]], targets=[2.0]),
]


def known(rows, **options):
    """A judged pair's two texts → its identity."""
    batch = collate(rows, PACKED, identified=True, **options)
    ids = batch.tokens.input_ids.flatten()
    found = {}
    for better, worse, number in zip(batch.pairs.better, batch.pairs.worse, batch.pairs.identity.tolist()):
        ends = [batch.tokens.spans[side][: batch.tokens.span_lengths[side]] for side in (better, worse)]
        found[tuple(tuple(ids[end].tolist()) for end in ends)] = number
    return found


def test_a_pair_is_known_by_its_texts_alone():
    """In any order, merged or alone, wherever its prompt was cut; but not the other way round."""
    whole = known(ROWS)
    assert len(set(whole.values())) == 5
    assert known(ROWS[::-1]) == whole == known(ROWS, groups=[0, 0, 1, 2])
    (alone,) = known(ROWS[:1]).values()
    assert alone == whole[(3,), (4, 5)] == -214696260350738251  # on every machine, also for a run that goes on
    for other in (
        Comparison([1], [[2, 4, 5], [2, 3]], [1], [0], prompt_hash=1),
        Comparison([], [[1, 2, 3], [1, 2, 4, 5]], [0], [1]),
    ):
        assert collate([other], PACKED, identified=True).pairs.identity.tolist() == [alone]
    turned = replace(ROWS[0], better=[1], worse=[0])
    assert collate([turned], PACKED, identified=True).pairs.identity.tolist() != [alone]


def test_a_row_is_known_by_its_ranking_in_whatever_order_it_lists_it():
    batch = collate(ROWS, PACKED, identified=True)
    places = batch.points.row_indices.tolist()
    of_row = dict(zip(places, batch.points.identity.tolist()))
    assert batch.lists.identity.tolist() == [of_row[2]]
    assert [of_row[0], of_row[1]] == batch.pairs.identity.tolist()[:2]  # a row of one pair is that pair
    turned = Comparison([1], [[2], [9], [8]], [2, 2, 1], [1, 0, 0], ranks=[2, 1, 0])
    assert collate([turned], PACKED, identified=True).lists.identity.tolist() == [of_row[2]]
    assert collate([replace(turned, ranks=[0, 1, 2])], PACKED, identified=True).lists.identity.tolist() != [of_row[2]]


def test_what_a_row_is_known_by_is_computed_where_something_is_drawn_by_it(monkeypatch):
    """Of one head nothing is; several heads refuse a batch that does not say it, of one pair, too."""
    context = SimpleNamespace(data_rank=0, data_size=1, device=torch.device("cpu"))
    data = table(ROWS)

    def batches(identified):
        planner = Planner(BatchConfig(per_device_train_batch_size=4), 4, 0, context, True, identified)
        plan = planner.epoch(planner.training_groups(data), 0, "packed")
        return [batch for step in planner.load(data, plan, PACKED) for batch in step]

    for batch in batches(True):
        assert len(batch.points.identity) == len(batch.points.row_weights)
    monkeypatch.setattr("reward_model.batching.collate.text_digests", None)  # cannot be called
    found = batches(False)
    assert [len(part.identity) for b in found for part in (b.pairs, b.lists, b.points)] == [0] * 3 * len(found)
    one = collate(ROWS[:1], PACKED)
    with pytest.raises(AssertionError, match="not identified"):
        Objective(loss_of("")).of_heads(one, torch.zeros(len(one.tokens.ends), 2))


def test_the_weights_are_poisson_by_identity_seed_and_head():
    identities = torch.randint(-(2**63), 2**63 - 1, (50_000,), generator=torch.Generator().manual_seed(0))
    weights = Bootstrap(3).weights(identities, 4)
    for count in range(5):
        expected = math.exp(-1) / math.factorial(count)
        assert (weights == count).double().mean().item() == pytest.approx(expected, abs=0.004)
    assert weights.mean(0).tolist() == pytest.approx([1.0] * 4, abs=0.02)
    assert torch.corrcoef(weights.T).triu(1).abs().max() < 0.02
    order = torch.randperm(len(identities))
    assert torch.equal(Bootstrap(3).weights(identities[order], 4), weights[order])
    assert torch.equal(Bootstrap(3).weights(identities, 2), weights[:, :2])
    assert not torch.equal(Bootstrap(4).weights(identities, 4), weights)
    assert Bootstrap(1).weights(torch.tensor([0, 1, -1, 2**62]), 5).int().tolist() == PINNED


PINNED = [[3, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 0, 0, 1, 0], [2, 2, 3, 0, 1]]  # for a run that goes on


def test_each_head_begins_by_itself():
    weights = drawn(8, 256, seed=1)
    assert weights.std(1).tolist() == pytest.approx([1 / 257] * 8, rel=0.2)
    assert torch.corrcoef(weights).triu(1).abs().max() < 0.25
    assert torch.equal(drawn(3, 256, seed=1), weights[:3]) and not torch.equal(drawn(8, 256, seed=2), weights)


# --- the loss ---


def batch_of(flags):
    """Rows that suit whatever loss there is."""
    chance = np.random.default_rng(1)
    rows = []
    for i in range(6):
        texts = [[10 * i + k, *chance.integers(100, 200, k + 1).tolist()] for k in range(4)]
        order = chance.permutation(4).tolist()
        pairs = [(a, b) for a in range(4) for b in range(4) if order[a] < order[b]]
        more = {"margin": [0.3 * (k + 1) for k in range(6)], "probability": [0.9] * 6, "similarity": [0.4] * 6}
        targets = [float(t) for t in chance.integers(0, 2 if "bce" in flags else 4, 4)]
        better, worse = ([pair[side] for pair in pairs] for side in (0, 1))
        rows.append(Comparison([i, 3], texts, better, worse, prompt_hash=i, ranks=order, targets=targets, **more))
    weights = None if flags.startswith("--loss logistic") else [1.0] * len(rows)
    return collate(rows, PACKED, row_weights=weights, identified=True)


LOSSES = [
    "--loss logistic --margin column --label_smoothing column",
    "--loss scaled --margin column",
    "--loss hinge --score_penalty center",
    "--loss focal",
    "--loss direct",
    "--loss prior_length",
    "--loss prior_cosine --prior_model none",
    "--loss rank_list --length_penalty 0.5",
    "--loss plackett_luce --score_penalty zero_sum",
    "--loss best_of_k",
    "--loss mse --score_penalty l2",
    "--loss huber",
    "--loss bce",
    "--loss ordinal",
    "--loss logistic rank_list mse --loss_weight 1 0.5 2",
]


@pytest.mark.parametrize("flags", LOSSES)
def test_heads_learn_as_so_many_models_with_one_head_would(flags):
    """Each from its own draws of the rows: a batch whose pairs, lists and targets weigh as often as it drew them."""
    count, objective, batch = 3, Objective(loss_of(flags), seed=5), batch_of(flags)
    plain = Objective(loss_of(re.sub(r"--(score|length)_penalty \S+", "", flags)), seed=5)
    thresholds = torch.tensor([-0.5, 0.2, 0.9], dtype=torch.float64)
    torch.manual_seed(0)
    scores = torch.randn(len(batch.tokens.ends), count, dtype=torch.float64, requires_grad=True)
    found = objective(batch, scores.mean(-1), None, thresholds, scores)
    (gradient,) = torch.autograd.grad(found, scores)
    total, gradients = 0.0, []
    for k in range(count):
        drawn_by = [objective.bootstrap.weights(part.identity, count)[:, k] for part in (batch.pairs, batch.lists)]
        of_rows = objective.bootstrap.weights(batch.points.identity, count)[:, k][batch.points.rows]
        own = replace(
            batch,
            pairs=replace(batch.pairs, weights=batch.pairs.weights * drawn_by[0]),
            lists=replace(batch.lists, weights=batch.lists.weights * drawn_by[1]),
            points=replace(batch.points, weights=batch.points.weights * of_rows),
        )
        alone = scores[:, k].detach().requires_grad_()
        loss = plain(own, alone, None, thresholds) + objective.penalties(batch, alone)
        gradients.append(torch.autograd.grad(loss, alone)[0])
        total += loss.item()
    assert found.item() == pytest.approx(total / count, rel=1e-6)
    torch.testing.assert_close(gradient * count, torch.stack(gradients, 1), rtol=1e-5, atol=1e-8)
    assert gradient.std(1).max() > 1e-4


def test_with_one_head_a_batch_costs_what_it_did():
    batch, scores = batch_of(LOSSES[0]), torch.randn(24)
    objective = Objective(loss_of(""))
    gaps = scores[batch.pairs.better] - scores[batch.pairs.worse]
    expected = (torch.nn.functional.softplus(-gaps) * batch.pairs.weights).sum()
    assert objective(batch, scores).item() == pytest.approx(expected.item(), rel=1e-6)


# --- the model ---

KINDS = {"decoder": ("llama", {}), "mean": ("llama", {"pooling": "mean"}), "encoder": ("bert", {})}
KINDS |= {"drop-in": ("cohere", {}), "two layers": ("roberta", {})}


def at_ends(batch):
    return torch.arange(len(batch.ends)) * batch.input_ids.shape[1] + batch.ends


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_each_head_its_score_and_gradient(kind, tmp_path):
    family, options = KINDS[kind]
    tokenizer = models.write(family, tmp_path)
    batch, count = models.batch(tokenizer), 3
    torch.manual_seed(0)  # RoBERTa's head has a layer more, which Transformers draws
    scorer = load_for_training(str(tmp_path), torch.float32, seed=1, heads=count, **options).eval()
    scores, extras = scorer(batch.input_ids, batch.attention_mask, at_ends(batch))
    assert list(extras) == ["heads"] and extras["heads"].shape == (len(batch.ends), count)
    torch.testing.assert_close(scores, extras["heads"].mean(-1))
    assert extras["heads"].std(1).min() > 1e-4
    layer = head_layer(scorer)
    embedding = scorer.backbone.get_input_embeddings().weight
    weights = torch.randn(len(batch.ends))
    gradients = torch.autograd.grad((extras["heads"] * weights[:, None]).sum(), [layer.weight, embedding])
    of_embedding = 0.0
    for k in range(count):
        torch.manual_seed(0)
        one = load_for_training(str(tmp_path), torch.float32, seed=1, **options).eval()
        with torch.no_grad():
            head_layer(one).weight.copy_(layer.weight[k : k + 1])
            if layer.bias is not None:
                head_layer(one).bias.copy_(layer.bias[k : k + 1])
        alone = one(batch.input_ids, batch.attention_mask, at_ends(batch))
        torch.testing.assert_close(alone, extras["heads"][:, k], atol=1e-6, rtol=1e-5)
        own = [head_layer(one).weight, one.backbone.get_input_embeddings().weight]
        found = torch.autograd.grad((alone * weights).sum(), own)
        torch.testing.assert_close(found[0][0], gradients[0][k], atol=1e-6, rtol=1e-4)
        of_embedding = of_embedding + found[1]
    torch.testing.assert_close(of_embedding, gradients[1], atol=1e-5, rtol=1e-4)


def test_the_anchor_is_the_squared_distance_from_where_a_head_began(tmp_path):
    tokenizer = models.write("bert", tmp_path)
    batch = models.batch(tokenizer)
    scorer = load_for_training(str(tmp_path), torch.float32, seed=1, heads=4, anchored=True)
    layer, began = head_layer(scorer), drawn(4, 32, seed=1)
    given = batch.input_ids, batch.attention_mask, at_ends(batch)
    assert scorer(*given)[1]["anchor"].item() == 0.0
    with torch.no_grad():
        layer.weight.add_(torch.arange(4.0)[:, None])
        layer.bias.add_(0.5)
    anchor = scorer(*given)[1]["anchor"]
    assert anchor.item() == pytest.approx((32 * (0 + 1 + 4 + 9) + 4 * 0.25) / 4)
    gradient = torch.autograd.grad(anchor, layer.weight)[0]
    torch.testing.assert_close(gradient, 2 * (layer.weight - began) / 4)
    assert not [name for name in scorer.state_dict() if "initial" in name]
    with torch.no_grad():
        assert "anchor" not in scorer(*given)[1]
    again = load_for_training(str(tmp_path), torch.float32, seed=1, heads=4, anchored=True)
    assert torch.equal(head_layer(again).initial, layer.initial)


# --- what is saved ---

FORMS = {
    "llama": {"family": "llama"},
    "bfloat16": {"family": "llama", "dtype": torch.bfloat16},
    "bert": {"family": "bert"},
    "modules": {"family": "bert", "pooling": "mean"},
    "dschat": {"family": "llama", "save_format": "dschat"},
    "both": {"family": "gpt2", "save_format": "both"},
    "lora": {"family": "llama", "lora": True},
}
FAST = ["llama", "bert", "dschat"]


def saved(folder, heads=4, **options):
    """A saved model, and each head's score of a few texts as it has them; dtype: to which it is cast before."""
    dtype = options.pop("dtype", None)
    place = save(folder, heads=heads, **options)
    if dtype:
        scorer = load(place).scorer.to(dtype)
        shutil.rmtree(place)
        from reward_model.models import saving

        saving.save(scorer, models.write("llama", folder / "base"), place)
    return place


def heads_of(reward, texts=TEXTS):
    """(n, K), of rows of their own."""
    rows = reward.rows(texts[0], [[response] for response in texts[1]])
    found = reward._columns_of_texts([row.text(0) for row in rows])
    return found[:, 1:] - reward.mean


@pytest.mark.parametrize(
    "form", [*FAST, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in FAST)]
)
def test_the_saved_model_has_the_mean_and_beside_it_all(form, tmp_path):
    folder = saved(tmp_path, **FORMS[form])
    config = json.loads((folder / "config.json").read_text())
    assert (config["score_heads"], config["score_beta"]) == (4, 1.0)
    tensors = load_file(folder / FOLDER / FILE)
    assert tensors["weight"].shape[0] == 4 and ("bias" in tensors) == (form == "bert")
    assert not list(folder.glob("heads*.safetensors"))  # vLLM would read it as weights
    reward = load(folder)
    assert reward.scorer.heads == 4
    scores, each = torch.tensor(reward.score(*TEXTS)), heads_of(reward)
    torch.testing.assert_close(each.mean(1), scores, atol=1e-5, rtol=1e-5)
    assert each.std(1).min() > 0.01
    rows = reward.rows(TEXTS[0], [[response] for response in TEXTS[1]])
    together = torch.cat([torch.tensor(scores) for scores in reward.scores_of_heads(rows)])
    torch.testing.assert_close(together.float(), each, atol=0.02 if form == "bfloat16" else 1e-5, rtol=1e-5)
    if form not in ("modules", "dschat"):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        rows = reward.encoding.rows(*TEXTS)
        for row, score in zip(rows, scores.tolist()):
            ids = torch.tensor([row.prompt + row.responses[0]])
            more = {"token_type_ids": torch.tensor([[0] * len(row.prompt) + [1] * len(row.responses[0])])}
            logits = model.eval()(ids, **(more if row.two_segments else {})).logits
            tolerance = {"abs": 0.02} if form == "bfloat16" else {"abs": 1e-5}
            assert logits.shape == (1, 1) and logits.item() == pytest.approx(score, **tolerance)
    if form == "lora":
        (folder / "adapter").rename(tmp_path / "adapter")
        torch.testing.assert_close(heads_of(load(tmp_path / "adapter")), each, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_average_to_the_model_are_refused(tmp_path, capsys):
    folder = saved(tmp_path)
    file, weights = folder / FOLDER / FILE, load_file(folder / "model.safetensors")
    tensors = load_file(file)
    whole = file.read_bytes()
    save_file({"weight": tensors["weight"] * 1.01}, file)
    with pytest.raises(UserError, match="does not average to the model's score head, so that one of the two"):
        load(folder)
    save_file({"weight": tensors["weight"][:3].contiguous()}, file)
    with pytest.raises(UserError, match="4 heads of this model would be"):
        load(folder)
    file.write_bytes(whole[:50])
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)
    file.write_bytes(whole)
    weights["score.weight"] = weights["score.weight"] + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="remove the folder to score without a standard deviation"):
        load(folder)
    shutil.rmtree(folder / FOLDER)
    capsys.readouterr()
    assert load(folder).scorer.heads == 1
    assert "config.json names 4 heads, and heads/heads.safetensors is not there" in capsys.readouterr().out


def test_a_model_of_one_head_has_no_such_file(tmp_path):
    folder = save(tmp_path)
    assert not (folder / FOLDER).exists() and "score_heads" not in (folder / "config.json").read_text()
    (row,) = load(folder).assess_rows(load(folder).rows(["cat"], [[" mat", " fish"]]))
    assert row.beside == {}


# --- where a training starts ---


def test_a_start_from_heads_says_what_becomes_of_them(tmp_path, capsys):
    folder = saved(tmp_path)
    name, tensors = str(folder), load_file(folder / FOLDER / FILE)
    same = load_for_training(name, torch.float32, seed=9, heads=4, anchored=True)
    assert torch.equal(head_layer(same).weight, tensors["weight"])
    assert torch.equal(head_layer(same).initial, tensors["weight"])
    assert f"heads: the 4 of {name}" in capsys.readouterr().out
    other = load_for_training(name, torch.float32, seed=9, heads=2)
    mean = tensors["weight"].mean(0)
    torch.testing.assert_close(head_layer(other).weight, drawn(2, 32, seed=9) + mean)
    assert f"the 4 heads of {name} are not read: each begins with their mean" in capsys.readouterr().out
    one = load_for_training(name, torch.float32, seed=9)
    torch.testing.assert_close(head_layer(one).weight[0], mean)
    assert f"{name} has 4 heads: their mean is trained, as one; --heads 4" in capsys.readouterr().out
    new = load_for_training(name, torch.float32, seed=9, heads=4, new_head=True)
    assert torch.equal(head_layer(new).weight, drawn(4, 32, seed=9))


def test_another_file_of_heads_is_another_model(tmp_path):
    folder = saved(tmp_path)
    before = hash_of_model(str(folder))
    file = folder / FOLDER / FILE
    save_file({"weight": load_file(file)["weight"].flip(0)}, file)
    assert hash_of_model(str(folder)) != before


def test_a_run_before_there_were_heads_is_one_with_a_single_head():
    assert differences({}, {"heads": 1, "head_anchor": 0.0}) == []
    assert differences({}, {"heads": 2}) == ["--heads (1 there, 2 here)"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--heads 0", "--heads 0: below 1"),
        ("--heads 65", "--heads 65: not in [1, 65)"),
        ("--head_anchor 0.1", "--head_anchor keeps several heads apart: give --heads 2 or more"),
        ("--heads 4 --loss_level token", "--loss_level token and --heads 4"),
        ("--heads 4 --head_anchor -1", "--head_anchor -1.0: below 0"),
    ],
)
def test_what_does_not_go_together_is_told(flags, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(["--model_name_or_path", "m", *flags.split()])


# --- scoring ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = saved(tmp_path_factory.mktemp("heads"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"score_beta": 0.5, "score_mean": 0.25}))
    return place


PROMPTS, RESPONSES = ["the cat sat", "where is"], [[" on the mat", " there", " fish"], [" the cat"]]


def test_a_score_comes_with_its_spread_and_lower_bound(folder):
    reward = load(folder)
    rows = reward.rows(PROMPTS, RESPONSES)
    found = reward.assess_rows(rows)
    assert reward.score_rows(rows) == [row.scores for row in found]
    for prompt, responses, row in zip(PROMPTS, RESPONSES, found):
        each = heads_of(reward, ([prompt] * len(responses), responses)).double().numpy()
        assert row.scores == pytest.approx(each.mean(1), abs=1e-5)
        assert row.beside["std"] == pytest.approx(each.std(1), abs=1e-5) and min(row.beside["std"]) > 0.01
        assert row.beside["lower"] == pytest.approx(each.mean(1) - 0.5 * each.std(1), abs=1e-5)


def test_score_writes_them_and_so_does_serve(folder):
    rows = [{"prompt": PROMPTS[0], "responses": RESPONSES[0]}, {"prompt": PROMPTS[1], "response": RESPONSES[1][0]}]
    several, one = stream.score(str(folder), rows)
    assert list(several) == ["row", "scores", "raw", "std", "lower"] and len(several["std"]) == 3
    assert list(one) == ["row", "score", "raw", "std", "lower"] and isinstance(one["lower"], float)
    (best,) = stream.score(str(folder), rows[:1], ScoreConfig(best=True))
    at = best["best"]
    assert (best["std"], best["lower"]) == (several["std"][at], several["lower"][at])
    with Running(folder, loaded=load_to_read(str(folder))) as running:
        answer = running.ask("/score", {"prompt": PROMPTS[0], "responses": RESPONSES[0]}).body
        assert answer["std"] == pytest.approx(several["std"], abs=1e-5)
        assert answer["lower"] == pytest.approx(several["lower"], abs=1e-5)
        assert "lower" in json.dumps(running.ask("/openapi.json").body["components"]["schemas"]["Scores"])


def test_the_user_chooses_the_bound(folder, tmp_path, monkeypatch):
    """Once for score, serve and evaluate; of a model with one head there is none to choose."""
    rows = [{"prompt": PROMPTS[0], "responses": RESPONSES[0]}]
    (usual,), (wider,), (none,) = (stream.score(str(folder), rows, ScoreConfig(beta=beta)) for beta in (None, 2.0, 0.0))
    assert wider["scores"] == usual["scores"] == none["lower"]
    for score, spread, lower in zip(wider["scores"], wider["std"], wider["lower"]):
        assert lower == pytest.approx(score - 2 * spread, abs=1e-5)
    asked = []
    monkeypatch.setattr("reward_model.serving.api.load_to_read", lambda *args, beta: asked.append(beta) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serve(str(folder), ServeConfig(beta=3.0, port=0))
    assert asked == [3.0]
    shutil.copytree(folder, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / FOLDER)
    with pytest.raises(UserError, match=r"--beta 2: .*one has one head, and no lower bound"):
        stream.score(str(tmp_path / "one"), rows, ScoreConfig(beta=2.0))
    with pytest.raises(UserError, match=r"beta -1\.0: below 0"):
        ScoreConfig(beta=-1.0)


def test_a_bound_that_is_no_number_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"score_beta": "much"}))
    with pytest.raises(UserError, match=r"score_beta in config\.json is much: give a number from 0 on"):
        load(tmp_path / "copy")


def test_evaluate_tells_what_the_spread_is_worth(folder, tmp_path, capsys, own_cache):
    pairs = [{"prompt": "cat ", "chosen": f"sat {i}", "rejected": f"mat {i * i}"} for i in range(30)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["evaluate", str(folder), "--data", str(data), "--data_output_path", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["assessments"]
    told, reward = found["bounds"], load(folder)
    sides = [heads_of(reward, (["cat "] * 30, [pair[side] for pair in pairs])) for side in ("chosen", "rejected")]
    gaps = (sides[0] - sides[1]).double().numpy()
    assert (told["heads"], told["beta"]) == (4, 0.5)
    assert told["gap_std"] == pytest.approx(gaps.std(1).mean(), abs=1e-5)
    sure = np.abs(gaps.mean(1)) > 0.5 * gaps.std(1)
    assert told["sure"] == pytest.approx(sure.mean())
    assert told["accuracy_sure"] == pytest.approx((gaps.mean(1) > 0)[sure].mean())
    assert sum(part["pairs"] for part in told["by_spread"]) == 30 and len(told["by_spread"]) == 5
    capsys.readouterr()
    assert main([*words, "--beta", "1.5", "--json"]) == 0
    (other,) = json.loads(capsys.readouterr().out)["assessments"]
    assert other["bounds"]["beta"] == 1.5
    assert other["bounds"]["sure"] == pytest.approx((np.abs(gaps.mean(1)) > 1.5 * gaps.std(1)).mean())
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "4; standard deviation of scores" in said and "lower bound σ(gap − 0.5·std) too high by" in said


# --- bounds ---


def judged(heads):
    """Pairs of which the first answer is the better one; heads (p, 2, K)."""
    heads = np.asarray(heads, float)
    count = len(heads)
    numbers, nothing = np.arange(2 * count).reshape(count, 2), np.zeros(2 * count)
    flat = heads.reshape(2 * count, -1)
    return Judged(
        data=None, prompts=np.arange(count), subsets=np.array([""] * count), rows=np.repeat(np.arange(count), 2),
        scores=flat.mean(1), lengths=nothing, ranks=nothing, targets=nothing, better=numbers[:, 0], worse=numbers[:, 1],
        margins=nothing[:count], heads=flat,
    )  # fmt: skip


def test_the_spread_of_a_gap_is_that_of_the_heads_gaps():
    """By hand: heads that differ by what they add to both answers are sure; here u = 0, and 1 of the other pair."""
    found = judged([[[1, 3], [0, 2]], [[1, 3], [0, 0]]]).with_bounds(2.0)
    assert found.gap_spread.tolist() == [0.0, 1.0]
    assert found.beside["std"].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert found.beside["lower"].tolist() == [0.0, -1.0, 0.0, 0.0]
    moved = found.on_scale(2.0, 1.0)
    assert moved.gap_spread.tolist() == [0.0, 0.5] and moved.scores.tolist() == [0.0, -0.5, 0.0, -1.0]
    assert moved.beside["lower"].tolist() == [-1.0, -1.5, -1.0, -1.0]
    told = bounds(found)
    assert told["sure"] == 0.5 and told["accuracy_sure"] == 1.0 and told["accuracy_unsure"] == 1.0
    assert [part["pairs"] for part in told["by_spread"]] == [1, 1]
    assert bounds(replace(found, heads=None)) == {}


def test_a_lower_bound_may_be_too_low_but_not_too_high():
    """By hand: σ(2) = 0.881 where 3 of 4 are right; lowered by 1, σ(1) = 0.731 is a bound that holds."""
    gaps = np.array([2.0, 2.0, 2.0, -2.0])
    high = 1 / (1 + math.exp(-2)) - 0.75
    assert lower_bound_error(gaps, np.zeros(4)) == pytest.approx((high / 2, high))  # 0.119 < ¼: too low, which is fine
    # in the other order bounds are −2 − 1 and 2 − 1: σ(−3) = 0.05 where 1 of 4 is right
    assert lower_bound_error(gaps, np.ones(4)) == (0.0, 0.0)
    sure = lower_bound_error(np.array([-5.0]), np.zeros(1))
    assert sure == pytest.approx((0.5 / (1 + math.exp(-5)), 1 / (1 + math.exp(-5))))


# --- other forms, and whole runs ---


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "dschat", "openrlhf", "sentence-transformers"])
def test_export_keeps_them(to, folder, tmp_path, monkeypatch):
    from reward_model.training import fresh_load, verify

    monkeypatch.setattr(verify, "ask", fresh_load.answer)
    assert main(["export", str(folder), str(tmp_path / "new"), "--to", to]) == 0
    reward = load(tmp_path / "new")
    torch.testing.assert_close(heads_of(reward), heads_of(load(folder)), atol=1e-5, rtol=1e-5)
    assert (reward.beta, reward.mean) == (0.5, 0.25)


@pytest.mark.slow
def test_an_adapter_is_kept_with_its_heads(tmp_path, monkeypatch, own_cache):
    from reward_model.training import exporting, fresh_load, verify

    monkeypatch.setattr(verify, "ask", fresh_load.answer)
    monkeypatch.setattr(exporting, "verify_adapter", lambda *_: exporting.Line("PEFT", "same"))
    place = saved(tmp_path, lora=True)
    assert main(["export", str(place), str(tmp_path / "kept"), "--adapter"]) == 0
    assert adapters.is_adapter(str(tmp_path / "kept")) and (tmp_path / "kept" / FOLDER / FILE).is_file()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    kept = load(tmp_path / "kept")
    torch.testing.assert_close(heads_of(kept), heads_of(load(place)), atol=1e-5, rtol=1e-5)


FLAGS = ["--heads", 4, "--head_anchor", 0.05]


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained") / "out"
    flags = [*FLAGS, "--save_interval", 8, "--keep_best", "accuracy", "--normalize_scores", "eval"]
    return runs.train(demo, place, *flags), place


@pytest.mark.slow
def test_a_run_with_heads_and_what_it_leaves(trained, demo, tmp_path, capsys):
    metrics, place = trained
    assert metrics.final["accuracy"] >= 0.85 and metrics.final["gap_heads_std"] > 0.01
    reward = load(place)
    chosen, _ = (torch.tensor(reward.score(*zip(*rows))) for rows in runs.held_out(demo))
    by_others = [runs.reload_scores(place, rows) - reward.mean for rows in runs.held_out(demo)]
    torch.testing.assert_close(chosen, by_others[0], atol=1e-5, rtol=1e-5)
    scale = metrics.scales[0]["std"]
    each = [heads_of(reward, list(zip(*rows))) for rows in runs.held_out(demo)]
    spread = (each[0] - each[1]).std(1, correction=0).mean().item() * scale
    assert spread == pytest.approx(metrics.final["gap_heads_std"], rel=1e-3)
    told = json.loads((place / "evaluation.json").read_text())["assessments"][0]["bounds"]
    assert told["gap_std"] == pytest.approx(spread / scale, rel=1e-3)
    assert "The score is the mean of 4 heads" in (place / "README.md").read_text()
    assert main(["verify", str(place)]) == 0
    assert "nothing differs beyond rounding" in capsys.readouterr().out
    checkpoint = sorted((place / "checkpoints").iterdir())[-1]
    assert main(["export", str(checkpoint), str(tmp_path / "new")]) == 0
    assert load(tmp_path / "new").scorer.heads == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_with_heads_goes_on_as_if_nothing_had_been(stage, demo, tmp_path):
    flags = [*FLAGS, "--zero_stage", stage, "--save_interval", 8]
    whole = runs.train(demo, tmp_path / "whole", *flags)
    halt = [{"rank": 0, "step": 12, "signal": "SIGTERM"}]
    words = ["--model_name_or_path", demo / "model", "--data_path", demo / "data", "--output_dir", tmp_path / "out"]
    words += ["--max_seq_len", 256, "--learning_rate", 1e-3, "--data_output_path", demo / "cache"]
    assert runs.launch(*words, *flags, signals=halt).returncode != 0
    again = runs.train(demo, tmp_path / "out", *flags)
    assert "resumed from step 12" in again.output
    assert again.losses == whole.losses
    for name in ("model.safetensors", f"{FOLDER}/{FILE}"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--zero_stage", 1], ["--zero_stage", 2], ["--zero_stage", 3], ["--sequence_parallel_size", 2]],
    ids=lambda flags: flags[0][2:] + str(flags[1]),
)
def test_two_processes_learn_the_same(flags, trained, demo, tmp_path):
    shares = flags[0] == "--sequence_parallel_size"  # by an attention that rounds otherwise
    size, tolerance = (16, 1e-4) if shares else (8, 2e-5)
    two = runs.train(demo, tmp_path / "out", *FLAGS, *flags, "--per_device_train_batch_size", size, processes=2)
    assert two.losses == pytest.approx(trained[0].losses, abs=tolerance)
    assert two.final["gap_heads_std"] == pytest.approx(trained[0].evaluations[-1]["gap_heads_std"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_lora_with_heads(stage, demo, tmp_path):
    metrics = runs.train(demo, tmp_path / "out", *FLAGS, "--lora_dim", 8, "--zero_stage", stage)
    assert metrics.losses[-1] < metrics.losses[0]
    each = heads_of(load(tmp_path / "out"))
    assert each.shape == (3, 4) and each.std(1).min() > 0
    (tmp_path / "out" / "adapter").rename(tmp_path / "adapter")
    torch.testing.assert_close(heads_of(load(tmp_path / "adapter")), each, atol=1e-4, rtol=1e-4)
