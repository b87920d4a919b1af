# SPDX-License-Identifier: Apache-2.0
"""Novelty: the methods on made-up states, their quantiles and file, and the commands on a tiny model."""

import json

import models
import numpy as np
import pytest
import runs
import saved
import server
import torch

import reward_model
from reward_model.__main__ import main
from reward_model.common.errors import UserError
from reward_model.config.novelty import NoveltyConfig
from reward_model.inference import load
from reward_model.models import saving
from reward_model.novelty import distillation, exemplar
from reward_model.novelty.fitted import METHODS, Novelty, fingerprint, read_novelty
from reward_model.novelty.sample import drawn, held_out
from reward_model.serving.output import fingerprint as of_output

HEADS = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(exemplar, "STEPS", 20)
    monkeypatch.setattr(distillation, "STEPS", 20)


@pytest.fixture
def enough_steps(few_steps, monkeypatch):
    monkeypatch.setattr(exemplar, "STEPS", 100)
    monkeypatch.setattr(distillation, "STEPS", 200)


@pytest.fixture(scope="module")
def cloud():
    """Correlated states (600, 12) about a mean, and outliers (40, 12) that break the correlations."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 12, generator=generator)
    inside = torch.randn(600, 4, generator=generator) @ mixing + 0.1 * torch.randn(600, 12, generator=generator) + 3
    outside = 3 + 3 * mixing.norm(dim=0) * torch.randn(40, 12, generator=generator)
    return inside, outside


@pytest.mark.parametrize("name", METHODS)
def test_outliers_have_more_energy_than_the_texts_that_were_not_seen(name, cloud, enough_steps):
    inside, outside = cloud
    fitted = METHODS[name].fit(inside[:400], 1, HEADS)
    unseen, far = fitted.energy(inside[400:]), fitted.energy(outside)
    assert unseen.shape == (200,) and unseen.dtype == torch.float32
    least = 0.6 if name == "spread" else 0.9  # heads of random weights know nothing of the states
    assert (far[:, None] > unseen).float().mean() > least  # AUROC


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_and_the_global_state_stays(name, cloud):
    inside, outside = cloud
    before = torch.random.get_rng_state()
    one = METHODS[name].fit(inside, 3, HEADS).energy(outside)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(METHODS[name].fit(inside, 3, HEADS).energy(outside), one)
    if name in ("exemplar", "rnd"):
        assert not torch.equal(METHODS[name].fit(inside, 4, HEADS).energy(outside), one)


@pytest.mark.parametrize("name", METHODS)
def test_what_it_has_learned_makes_it_again(name, cloud):
    inside, outside = cloud
    fitted = METHODS[name].fit(inside, 1, HEADS)
    again = METHODS[name].of_tensors(fitted.tensors())
    assert torch.equal(again.energy(outside), fitted.energy(outside))


def test_distances_by_hand():
    states = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]) * 100
    fitted = METHODS["mahalanobis"].fit(states, 0)  # no correlation: the correlation matrix is the identity
    # variances 100² · ½ and 200² · ½: (100, 200) is at 2 + 2
    assert fitted.energy(torch.tensor([[100.0, 200.0], [0.0, 0.0]])).tolist() == pytest.approx([4.0, 0.0], abs=1e-4)
    relative = METHODS["relative_mahalanobis"].fit(states, 0)
    assert relative.energy(torch.tensor([[100.0, 200.0]])).tolist() == pytest.approx([0.0], abs=1e-4)


def test_the_classifier_begins_with_the_best_one_of_a_gaussian():
    classifier = exemplar.Classifier(3)
    torch.nn.init.zeros_(classifier.mlp[2].weight), torch.nn.init.zeros_(classifier.mlp[2].bias)
    one, other = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    normal = torch.distributions.Normal
    wanted = normal(one, exemplar.NOISE).log_prob(other).sum() - normal(0, 1).log_prob(other).sum()
    assert classifier(one, other).item() == pytest.approx(wanted.item(), abs=1e-5)
    assert exemplar.balanced_cross_entropy(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("name", ["mahalanobis", "exemplar"])
def test_novelty_is_a_quantile_of_texts_like_those_that_were_held_out(name, enough_steps):
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(3_000, 12, generator=generator)
    fitted = Novelty.of(METHODS[name].fit(states[:1_000], 0), states[1_000:2_000], 0.95, "", {})
    found = fitted(states[2_000:])
    for level in (0.1, 0.5, 0.9, 0.95):
        assert (found <= level).float().mean().item() == pytest.approx(level, abs=0.04)
    assert fitted(states[:1] + 1_000).item() == 1 and 0 <= found.min() <= found.max() <= 1
    assert fitted(torch.full((1, 12), torch.nan)).item() == 1
    assert fitted.is_novel([0.9, 0.95, 1.0]) == [False, True, True]


def test_more_units_than_texts_and_units_that_never_move():
    states = torch.randn(30, 100, generator=torch.Generator().manual_seed(1))
    states[:, 7] = 2.0
    for name in ("mahalanobis", "relative_mahalanobis", "exemplar", "rnd"):
        assert torch.isfinite(METHODS[name].fit(states, 0).energy(states + 1)).all(), name


def test_texts_are_drawn_by_what_they_are():
    texts = np.random.default_rng(0).integers(-(2**62), 2**62, 500)
    twice = np.concatenate([texts, texts[::-1]])
    first = drawn(twice, 100, seed=4)
    assert len(first) == 100 and len(set(twice[first])) == 100
    assert set(texts[::-1][drawn(texts[::-1].copy(), 100, seed=4)]) == set(twice[first])  # in any order
    assert set(twice[drawn(twice, 100, seed=5)]) != set(twice[first])
    prompts = np.arange(500) // 10
    held, by_prompt = held_out(texts, prompts, 0)
    assert by_prompt and held.sum() == 100 and not set(prompts[held]) & set(prompts[~held])
    held, by_prompt = held_out(texts, prompts // 10, 0)
    assert not by_prompt and held.sum() == 100


def _rows(path, count=60):
    texts = [f"the cat {i} sat on mat {i * i}" for i in range(count)]
    rows = [{"prompt": f"where {i % 30}?", "chosen": f" {a}", "rejected": f" {b}"} for i, (a, b) in
            enumerate(zip(texts, texts[::-1]))]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), pytest.param("bert", {"pooling": "mean"}, marks=pytest.mark.slow)]
)
def test_fit_writes_a_file_that_scoring_takes(tmp_path, family, options):
    folder = saved.save(tmp_path, family, **options)
    rows = _rows(tmp_path / "train.jsonl")
    plain = next(iter(reward_model.score(str(folder), [rows[0]])))
    assert "novelty" not in plain
    config = NoveltyConfig(data=[str(tmp_path / "train.jsonl")], data_output_path=str(tmp_path / "cache"))
    unfitted = of_output(load(folder))
    found = reward_model.fit_novelty(str(folder), config)
    assert of_output(load(folder)) != unfitted  # score --resume does not go on with lines of another fit
    assert found["by"] == "prompts" and found["texts"] + found["held_out"] == found["found"] == 120
    (one,) = reward_model.score(str(folder), [rows[0]])
    assert len(one["novelty"]) == 2 and all(0 <= each <= 1 for each in one["novelty"])
    assert one["scores"] == pytest.approx(plain["scores"], abs=1e-6)

    reward = load(folder)
    made = reward.rows([row["prompt"] for row in rows[:8]], [[row["chosen"], row["rejected"]] for row in rows[:8]])
    together = reward.assess_rows(made)
    energies = reward.novelty(reward.states_of_rows(made)).reshape(8, 2).tolist()
    for row, values in zip(together, energies):  # whichever batch a text came in
        assert row.beside["novelty"] == pytest.approx(values, abs=1e-3)
        novel = [value >= found["threshold"] for value in row.beside["novelty"]]
        assert row.beside["novel"] == novel and isinstance(novel[0], bool)
    with torch.no_grad():
        next(reward.scorer.backbone.parameters()).add_(0.01)
    with pytest.raises(UserError, match="other weights"):
        read_novelty(folder, reward.scorer)


def test_what_cannot_be_fitted_is_said(tmp_path):
    folder = saved.save(tmp_path, "llama")
    _rows(tmp_path / "few.jsonl", 4)
    options = {"data": [str(tmp_path / "few.jsonl")], "data_output_path": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="novelty needs 20"):
        reward_model.fit_novelty(str(folder), NoveltyConfig(**options))
    with pytest.raises(UserError, match="one score head"):
        reward_model.fit_novelty(str(folder), NoveltyConfig(method="spread", **options))
    with pytest.raises(UserError, match="--threshold"):
        NoveltyConfig(threshold=1.5)
    (folder / "novelty").mkdir()
    (folder / "novelty" / "novelty.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


def test_a_model_in_another_dtype_keeps_its_fingerprint_where_nothing_is_rounded(tmp_path):
    folder = saved.save(tmp_path, "llama")
    half, single = load(folder, torch.float16).scorer.half(), load(folder).scorer
    assert fingerprint(half) != fingerprint(single)
    assert fingerprint(half.float()) == fingerprint(load(folder, torch.float16).scorer)


# --- the commands ---


@pytest.mark.slow
@pytest.mark.parametrize(("method", "heads"), [("mahalanobis", 1), ("exemplar", 3), ("spread", 3)])
def test_fit_score_evaluate_and_serve_agree(tmp_path, capsys, method, heads):
    folder = saved.save(tmp_path, "llama", heads=heads)
    rows = _rows(tmp_path / "train.jsonl")
    data = ["--data", str(tmp_path / "train.jsonl"), "--data_output_path", str(tmp_path / "cache")]
    words = ["novelty", "fit", str(folder), *data, "--method", method, "--threshold", "0.4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{method} fitted to 96 texts, 24 held out by prompts: {folder}/novelty/novelty.safetensors" in out
    assert "called novel where its novelty is 0.4 or more" in out
    assert "novelty is a share of 24 held-out texts, known to 0.042 at best" in out
    assert main([*words, "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert (fitted["texts"], fitted["held_out"], fitted["threshold"]) == (96, 24, 0.4)

    assert main(["score", str(folder), str(tmp_path / "train.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(rows) and all(("std" in line) == (heads > 1) for line in lines)
    novelty = np.array([line["novelty"] for line in lines])
    novel = [line["novel"] for line in lines]
    assert novel == (novelty >= 0.4).tolist() and 0.05 < np.mean(novel) < 0.95
    assert main(["score", str(folder), str(tmp_path / "train.jsonl"), "--best"]) == 0
    for line, both in zip(map(json.loads, capsys.readouterr().out.splitlines()), lines):
        assert line["novelty"] == both["novelty"][line["best"]] and line["novel"] is both["novel"][line["best"]]

    assert main(["evaluate", str(folder), *data]) == 0
    said = capsys.readouterr().out
    assert main(["evaluate", str(folder), *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["assessments"][0]["novelty"]
    assert found["threshold"] == 0.4 and found["mean"] == pytest.approx(novelty.mean(), abs=1e-3)
    assert found["novel"] == pytest.approx(np.mean(novel), abs=0.02)  # a text may lie at the threshold
    assert f"tells wrong pairs with AUROC {found['wrong_auroc']['value']:.4f}" in said
    assert f"{found['mean']:.3f} on average, {found['novel']:.0%} of answers novel, at 0.4 or above" in said
    highest, wrong = novelty.max(1), np.array([line["scores"][0] < line["scores"][1] for line in lines])
    pairs = highest[wrong][:, None] - highest[~wrong]
    assert found["wrong_auroc"]["value"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=0.02)

    with server.Running(folder) as service:
        for row, line in zip(rows[:3], lines):
            asked = {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]}
            body = service.ask("/score", asked).body
            assert body["novelty"] == pytest.approx(line["novelty"], abs=1e-3) and body["novel"] == line["novel"]


def test_other_weights_in_the_folder_take_the_file_away(tmp_path, capsys):
    folder = saved.save(tmp_path, "llama")
    _rows(tmp_path / "train.jsonl")
    config = NoveltyConfig(data=[str(tmp_path / "train.jsonl")], data_output_path=str(tmp_path / "cache"))
    file = folder / "novelty" / "novelty.safetensors"
    assert reward_model.fit_novelty(str(folder), config)["file"] == str(file) and file.is_file()
    scorer = load(folder).scorer
    with torch.no_grad():
        next(scorer.backbone.parameters()).add_(0.01)
    capsys.readouterr()
    saving.save(scorer, models.write("llama", tmp_path / "base"), folder)
    said = capsys.readouterr()
    assert f"removed {file}: it was fitted to the weights before" in said.out + said.err
    assert not file.parent.exists() and load(folder).novelty is None


@pytest.mark.slow
def test_a_run_that_goes_on_drops_what_was_fitted_to_its_model(demo, tmp_path):
    out = tmp_path / "out"
    flags = ["--per_device_train_batch_size", 8, "--save_interval", 2, "--eval_interval", 0]
    runs.train(demo, out, *flags, "--max_steps", 2)
    config = NoveltyConfig(data=[str(demo / "data" / "train.jsonl")], data_output_path=str(tmp_path / "cache"))
    reward_model.fit_novelty(str(out), config)
    assert load(out).novelty is not None
    went_on = runs.train(demo, out, *flags, "--max_steps", 4)
    assert went_on.output.count("fitted to the weights before; run reward-model novelty fit again") == 1
    assert not (out / "novelty").exists() and load(out).novelty is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fti m --data x", "reward-model novelty has no command fti; did you mean fit?"),
        ("output --data x", "reward-model novelty has no command output; there is fit: fit MODEL --data …"),
        ("ft --dta x", "reward-model novelty has no command ft; did you mean fit?"),
        ("fit --data x", "give fit and the folder of one model before the flags: fit MODEL --data …"),
    ],
)
def test_a_command_that_is_not_there_is_told_with_the_nearest(words, said, capsys):
    assert main(["novelty", *words.split()]) == 1  # as for every other typing mistake
    assert capsys.readouterr().err.splitlines() == [f"error: {said}"]
