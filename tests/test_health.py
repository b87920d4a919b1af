# SPDX-License-Identifier: Apache-2.0
"""Steps that are skipped, and alarms: training/health.py and skipping.py by themselves, and in real runs."""

import json
import math
import re

import numpy as np
import pytest
import runs
import torch
from comparisons import pair, table

from reward_model.batching.groups import single_rows
from reward_model.batching.plan import BatchSpec, EpochPlan
from reward_model.common.errors import UserError
from reward_model.config.groups import LossConfig
from reward_model.config.loss import resolve_loss
from reward_model.data.comparisons import Origins
from reward_model.evaluation.metrics import pair_metrics
from reward_model.training.checkpoint import listed
from reward_model.training.health import Health, Watch, knows_log_2, made_equal, rows_in_words, ties
from reward_model.training.skipping import StepGuard, marked

LOG_2 = math.log(2)


class Records:
    """Keeps the lines of a run."""

    def __init__(self):
        self.lines = []

    def add(self, values):
        self.lines.append(values)


def health(**changes):
    values = {"learning_rate": 0.1, "dtype": "fp32", "max_bad_steps": 3, "score_limit": 32.0, "knows_log_2": True}
    return Health(Watch(**values | {"total_steps": 100} | changes), lambda rows: {"a.jsonl": (rows + 1).tolist()})


def train(watched, losses, mean=0.0):
    """The kinds of alarm that these steps raise."""
    found = []
    for step, loss in enumerate(losses, 1):
        values = {"step": step, "loss": loss, "chosen_mean": mean, "rejected_mean": -mean}
        found += [alarm.kind for alarm in watched.after_step(values)]
    return found


def evaluate(watched, step, chosen, rejected):
    chosen, rejected = np.array(chosen, float), np.array(rejected, float)
    metrics = pair_metrics(chosen, rejected, np.ones(len(chosen)), np.ones(len(chosen)))
    return watched.after_evaluation(step, metrics, {"chosen": chosen, "rejected": rejected})


# --- which rows ---


def test_rows_keep_their_file_and_number():
    one, other = Origins.of("a.jsonl", np.array([1, 2, 4])), Origins.of("b.jsonl", np.array([7, 8]))
    both = Origins.joined([one, other]).select(np.array([4, 2, 0]))
    assert both.by_file() == {"a.jsonl": [1, 4], "b.jsonl": [8]}
    assert Origins.joined([both, one]).by_file() == {"a.jsonl": [1, 1, 2, 4, 4], "b.jsonl": [8]}


def test_the_rows_of_a_step_are_those_of_all_ranks():
    rows = table([pair([1], [2 + number], [50]) for number in range(10)])
    plans = [EpochPlan(single_rows(rows), BatchSpec(micro_batch=2), rank, 2, seed=3, epoch=1) for rank in range(2)]
    for step in range(3):
        dealt = np.concatenate([m.rows for plan in plans for m in plan[step] if m.weight])
        assert plans[0].rows(step).tolist() == plans[1].rows(step).tolist() == sorted(dealt.tolist())


def test_rows_in_words_end_somewhere():
    found = {"a.jsonl": list(range(1, 7)), "b.jsonl": [5, 6, 7], "c.jsonl": [1]}
    assert rows_in_words(found) == "a.jsonl, rows 1, 2, 3, 4, 5, 6; b.jsonl, rows 5, 6; 2 more are in metrics.jsonl"


# --- bad steps ---


def test_bad_steps_are_counted_and_end_the_run():
    watched, records = health(), Records()
    watched.bad_steps.good(0.7)
    watched.skipped(2, math.nan, np.array([4, 9]), records)
    watched.skipped(3, 0.6, np.array([1, 2]), records)
    assert records.lines == [
        {"split": "bad_step", "step": 2, "in_a_row": 1, "rows": {"a.jsonl": [5, 10]}},
        {"split": "bad_step", "step": 3, "in_a_row": 2, "loss": 0.6, "rows": {"a.jsonl": [2, 3]}},
    ]
    watched.bad_steps.good(0.6)
    for step in (5, 6):
        watched.skipped(step, math.inf, np.array([3]), records)
    with pytest.raises(UserError, match=r"step 7: .* 3 steps in a row \(--max_bad_steps\).*likely cause"):
        watched.skipped(7, math.nan, np.array([3]), records)
    assert watched.bad_steps.count == 5
    assert "5 steps skipped" in watched.summary()[0]


def test_a_run_of_which_most_is_skipped_ends_although_good_steps_come_between():
    watched, records = health(), Records()
    for step in range(1, 28, 3):  # two of three are bad
        watched.bad_steps.good(0.7)
        for bad in (step + 1, step + 2):
            if watched.bad_steps.count == 9:
                with pytest.raises(UserError, match=r"step 15: .* in 10 of 15 steps \(--max_bad_steps\)"):
                    watched.skipped(bad, math.nan, np.array([3]), records)
                return
            watched.skipped(bad, math.nan, np.array([3]), records)


def test_bad_steps_that_are_few_beside_the_good_ones_end_nothing():
    watched, records = health(), Records()
    for step in range(1, 100):
        if step % 3:
            watched.bad_steps.good(0.7)
        else:
            watched.skipped(step, math.nan, np.array([3]), records)
    assert watched.bad_steps.count == 33


def cause(rows, losses=(0.7, 0.6), **changes):
    watched = health(**changes)
    for loss in losses:
        watched.bad_steps.good(loss)
    for step_rows in rows:
        watched.bad_steps.bad(np.array(step_rows))
    return watched.likely_cause()


def test_the_cause_is_a_row_that_is_in_every_bad_step():
    assert cause([[1, 2, 7], [7, 8], [7, 9, 10]]) == "a.jsonl, row 8 is in each of these steps: look there"
    assert cause([[1, 2, 7]]).startswith("a row, of those in metrics.jsonl")  # one step has many rows


def test_other_causes():
    assert "float16" in cause([[1], [2], [3]], dtype="fp16")
    assert cause([[1], [2]], losses=(0.7, 9.5)).startswith("--learning_rate 0.1 is too high: the loss of the last")
    assert cause([[1], [2]]).startswith("--learning_rate 0.1 is too high; or else rows")
    assert cause([[1], [2]], losses=()).startswith("no step was good")


def test_a_loss_that_is_not_finite_has_a_gradient_of_nan():
    for value, is_finite in ((0.75, True), (math.inf, False), (math.nan, False)):
        weight = torch.tensor(3.0, requires_grad=True)
        loss = marked(weight * 0.25 + (value - 0.75))
        loss.backward()
        assert weight.grad.isfinite().item() == is_finite
        assert not is_finite or (loss.item(), weight.grad.item()) == (0.75, 0.25)


class Engine:
    """Of DeepSpeed's, what the guard reads."""

    def __init__(self, optimizer):
        self.optimizer, self.lr_scheduler = optimizer, None

    def fp16_enabled(self):
        return True


def test_fused_adamw_is_held_back():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5, fused=True)
    guard = StepGuard(Engine(optimizer))

    def step(value):
        weights[0].grad, weights[1].grad = torch.ones(3), torch.full((2, 2), value)
        optimizer.step()
        kept = [optimizer.state[w][name].clone() for w in weights for name in ("step", "exp_avg", "exp_avg_sq")]
        return [w.detach().clone() for w in weights] + kept, guard.after_step()

    first, outcome = step(1.0)
    assert (outcome.skipped.item(), outcome.bad.item()) == (0, 0)
    for value in (math.nan, -math.inf):
        after, outcome = step(value)
        assert all(torch.equal(a, b) for a, b in zip(first, after))
        assert (outcome.skipped.item(), outcome.bad.item()) == (1, 1)
    after, outcome = step(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(first, after) if a.numel() > 1)
    assert after[2].item() == 2  # good steps


def test_an_overflow_of_float16_is_bad_once_its_scale_cannot_fall(monkeypatch):
    """DeepSpeed's own scaler: two overflows until it halves, first from 4 to 2, then to 1, and no further."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # there are no other processes to ask for
    scaler = loss_scaler.DynamicLossScaler(4, 100, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)

    class Wrapped:
        loss_scaler = scaler
        overflow = True

    guard = StepGuard(Engine(Wrapped))
    found = []
    for _ in range(5):
        scaler.update_scale(True)
        found.append(guard.after_step())
    assert [outcome.bad for outcome in found] == [0, 0, 0, 1, 1]
    assert all(outcome.skipped for outcome in found)


# --- alarms ---


def test_a_normal_run_raises_none(one_thread):
    generator = np.random.default_rng(0)
    watched = health(total_steps=400)
    course = 0.2 + 0.5 * np.exp(-np.arange(400) / 100)
    assert train(watched, course + generator.normal(0, 0.05, 400), mean=3.0) == []
    for step, size in ((0, 0.1), (200, 2.0), (400, 4.0)):
        chosen = generator.normal(size / 2, size, 200)
        assert evaluate(watched, step, chosen, generator.normal(-size / 2, size, 200)) == []
    assert watched.summary() == []


@pytest.mark.parametrize(
    ("losses", "kinds"),
    [
        ([LOG_2 + 0.01 * (-1) ** i for i in range(50)], ["loss_at_log_2"]),
        ([LOG_2 + 0.01 * (-1) ** i for i in range(49)], []),  # a short run
        ([LOG_2 - 0.01] * 50, []),  # something is learned
        ([LOG_2 + 0.1 * (-1) ** i for i in range(50)], []),  # hard data
        ([0.9 + 0.1 * (-1) ** i for i in range(200)], ["loss_above_log_2"]),  # once
        ([40.0] + [0.3] * 49, []),  # one step
        ([3.0 - 0.1 * i for i in range(30)] + [0.1] * 20, []),  # it falls
    ],
)
def test_losses(losses, kinds):
    assert train(health(), losses) == kinds
    assert train(health(knows_log_2=False), losses) == []


def test_nothing_is_said_of_the_warm_up_and_of_a_tenth_of_a_long_run():
    assert train(health(warmup=50), [LOG_2] * 99) == []
    assert train(health(total_steps=2_000), [LOG_2] * 199) == []
    assert train(health(total_steps=2_000), [LOG_2] * 200) == ["loss_at_log_2"]


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ({}, True),
        ({"score_penalty": "center"}, True),
        ({"margin": "1"}, False),
        ({"score_penalty": "log_barrier"}, False),
        ({"loss": ["hinge"]}, False),
        ({"loss": ["logistic", "mse"]}, False),
    ],
)
def test_log_2_is_the_loss_of_equal_scores_of_the_plain_loss_alone(flags, known):
    assert knows_log_2(resolve_loss(LossConfig(**flags))) == known


def test_scores_beyond_the_limit():
    assert train(health(), [0.5] * 3, mean=31.0) == []
    assert train(health(), [0.5] * 3, mean=33.0) == ["score_limit"]
    assert train(health(score_limit=0.0), [0.5] * 3, mean=1e6) == []
    assert train(health(largest_target=100.0), [0.5] * 3, mean=150.0) == []  # scores that are to be learned
    (alarm,) = evaluate(health(), 20, [-50, -49.4, -50.6], [-50.1, -49.5, -50.5])
    assert "held-out scores have a mean size of 50.02, beyond 32 (--score_limit)" in alarm.message
    assert "lower --learning_rate (0.1)" in alarm.message
    (alarm,) = evaluate(health(), 0, [50, 60], [40, 45])
    assert "learning_rate" not in alarm.message  # nothing was trained yet
    assert evaluate(health(), 20, [50, *[0.1] * 29], [0.0] * 30) == []  # one odd text


def test_bfloat16_is_a_quarter_apart_at_the_limit():
    limit = torch.tensor(32.0, dtype=torch.bfloat16)
    assert (torch.nextafter(limit, limit + 1) - limit).item() == 0.25
    (alarm,) = evaluate(health(), 20, [50, 60], [40, 45])
    assert "0.25 apart" in alarm.message


def test_scores_that_grow_while_the_accuracy_does_not():
    watched = health()
    assert evaluate(watched, 10, [3, 3, 3, -3], [0, 0, 0, 0]) == []
    assert evaluate(watched, 20, [9, 9, 9, -9], [-1, -1, -1, 1]) == []  # 5 on average: small still
    (alarm,) = evaluate(watched, 30, [20, 20, 20, -20], [-1, -1, -1, 1])
    assert alarm.kind == "score_growth"
    assert "from 1.5 to 10.5" in alarm.message
    assert evaluate(watched, 40, [30, 30, 30, -30], [-1, -1, -1, 1]) == []  # once
    better = health()
    assert evaluate(better, 10, [3, 3, 3, -3], [0, 0, 0, 0]) == []
    assert evaluate(better, 20, [20, 20, 20, 20], [-1, -1, -1, 1]) == []


def test_equal_scores():
    assert ties(5, 0.5, np.array([1.0, 2.0]), np.array([0.5, 3.0])) == []  # accuracy 0.5 without a tie
    (alarm,) = ties(5, 0.5, np.ones(8), np.ones(8))
    assert "8 of 8 held-out pairs have two equal scores: the accuracy is 0.5000, and 0.5000 with" in alarm.message
    assert evaluate(health(), 0, np.zeros(8), np.zeros(8)) == []  # a head of zeros, before training
    assert [alarm.kind for alarm in evaluate(health(), 1, np.zeros(8), np.zeros(8))] == ["ties"]


def test_rows_that_became_equal():
    same = {"better": [5, 9], "worse": [6, 9]}
    rows = table(
        [
            pair([1, 2], same["better"], same["worse"], prompt_hash=1),
            pair([1, 2], same["worse"], same["better"], prompt_hash=2),  # the other way round, too
            pair([1, 2], same["better"], same["worse"], prompt_hash=1),
            pair([1, 2], [7, 9], [8, 9], prompt_hash=3),
        ]
    )
    assert made_equal(rows) == 0
    cut = rows.table.remove_columns("cut").add_column("cut", [True, True, False, True])
    rows.table = cut
    assert made_equal(rows) == 2  # the third was not cut, the fourth is unlike any other
    (alarm,) = health().before_training(rows)
    assert alarm.message.startswith("2 training rows became equal to a row of another prompt")


def test_what_was_seen_is_taken_up_again():
    watched = health()
    train(watched, [LOG_2] * 30, mean=40.0)
    evaluate(watched, 30, [3, 3], [0, 0])
    watched.skipped(31, math.nan, np.array([4]), Records())
    other = health()
    other.restore(json.loads(json.dumps(watched.state())))
    assert other == Health(other.watch, other.where, *[getattr(watched, name) for name in STATE])
    assert other.summary() == watched.summary()
    assert train(other, [LOG_2] * 20) == ["loss_at_log_2"]
    assert train(other, [0.1], mean=50.0) == []


STATE = ("bad_steps", "block", "best", "alarms")


# --- real runs ---

BAD = (1, 4)


def run_with_bad_steps(demo, folder, kind, *flags, processes=1):
    """Six steps of which two are bad on the last rank: the losses of the others, what is said, the rows."""
    words = [kind, ",".join(map(str, BAD)), processes - 1]
    words += ["--model_name_or_path", demo / "model", "--data_path", demo / "data"]
    words += ["--data_output_path", demo / "cache"]
    words += ["--max_seq_len", 256, "--max_train_samples", 96, "--per_device_train_batch_size", 16 // processes]
    words += ["--learning_rate", 1e-3, "--weight_decay", 0.1, "--output_dir", folder / "out", *flags]
    script = runs.TOP / "tests" / "helpers" / "bad_steps.py"
    done = runs.launch(*words, processes=processes, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    for rank in range(processes):
        states = json.loads((folder / f"states{rank}.json").read_text())
        same = [step for step in range(1, 7) if states[step] == states[step - 1]]
        assert same == list(BAD), states
    bad = [line for line in lines if line["split"] == "bad_step"]
    assert [line["step"] for line in bad] == list(BAD)
    assert [len(numbers) for line in bad for numbers in line["rows"].values()] == [16, 16]
    assert "warning: 2 steps skipped for a loss or gradient that was not finite" in done.stdout
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def at_stage_0(demo, tmp_path_factory):
    return run_with_bad_steps(demo, tmp_path_factory.mktemp("bad"), "loss")


def test_a_bad_step_leaves_weights_and_moments(at_stage_0):
    assert len(at_stage_0) == 4
    assert np.isfinite(at_stage_0).all()


SETTINGS = ["0", "1", "2", "3", "1 --offload", "2 --offload", "3 --offload", "0 --optim adamw_8bit"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_bad_step_at_every_setting(setting, dtype, processes, at_stage_0, demo, tmp_path):
    kind = "gradient" if dtype == "bf16" or setting == "0" else "loss"
    flags = ["--zero_stage", *setting.split(), "--dtype", dtype]
    losses = run_with_bad_steps(demo, tmp_path, kind, *flags, processes=processes)
    if "optim" not in setting:  # the schedule goes on through a bad step at every stage
        assert losses == pytest.approx(at_stage_0, abs=1e-5 if dtype == "fp32" else 0.01)


def test_a_row_that_spoils_its_steps_is_named(demo, tmp_path):
    """A score of 1e30, whose squared error is infinite, in each of two epochs."""
    rows = [json.loads(line) for line in (demo / "data" / "train.jsonl").read_text().splitlines()[:80]]
    single = [{"prompt": row["prompt"], "response": row["chosen"], "score": i % 3} for i, row in enumerate(rows)]
    single[6]["score"] = 1e30
    train_file, eval_file = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train_file.write_text("".join(json.dumps(row) + "\n" for row in single))
    eval_file.write_text("".join(json.dumps(row | {"score": 1}) + "\n" for row in single[:9]))
    result = runs.launch(
        "--model_name_or_path", demo / "model", "--data_path", train_file, "--eval_data_path", eval_file,
        "--data_output_path", demo / "cache", "--output_dir", tmp_path / "out", "--max_seq_len", 256, "--loss", "mse",
        "--num_train_epochs", 2, "--per_device_train_batch_size", 8,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    said = "warning: 2 steps skipped for a loss or gradient that was not finite"
    (named,) = re.findall(rf"{said}; {train_file}, rows? ([\d, ]+) in each of them", result.stdout)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    bad = [line["rows"][str(train_file)] for line in lines if line["split"] == "bad_step"]
    assert len(bad) == 2
    assert all(7 in numbers and len(numbers) == 8 for numbers in bad)
    assert named == ", ".join(str(number) for number in bad[0] if number in bad[1])


@pytest.mark.slow
def test_too_many_bad_steps_end_the_run(demo, tmp_path):
    script = runs.TOP / "tests" / "helpers" / "bad_steps.py"
    words = ["loss", "3,4,5,6", 0, "--zero_stage", 2, "--model_name_or_path", demo / "model"]
    words += ["--data_path", demo / "data", "--data_output_path", demo / "cache"]
    words += ["--output_dir", tmp_path / "out", "--max_seq_len", 256]
    done = runs.launch(*words, "--max_bad_steps", 2, script=script)
    assert done.returncode == 1
    assert "error: step 4: a loss or gradient was not finite in 2 steps in a row (--max_bad_steps)" in done.stderr
    states = json.loads((tmp_path / "states0.json").read_text())
    assert states[2] == states[3] == states[4]  # the weights of the last good step
    assert [each.fault() for each in listed(tmp_path / "out")] == [""]  # and a checkpoint has them


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 100])
def test_a_learning_rate_that_is_far_too_high_is_said(rate, demo, tmp_path):
    """Both once ended with status 0 and not a word: scores of −50 ± 0.6, and of millions."""
    result = runs.launch(
        "--model_name_or_path", demo / "model", "--data_path", demo / "data", "--data_output_path", demo / "cache",
        "--output_dir", tmp_path / "out", "--max_seq_len", 256, "--learning_rate", rate, "--max_train_samples", 112,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    if result.returncode:
        assert f"likely cause: --learning_rate {rate:g} is too high" in result.stderr
        return
    alarm = next(line for line in lines if line["split"] == "alarm")
    assert alarm["kind"] == "score_limit"
    assert f"lower --learning_rate ({rate:g})" in alarm["message"]
    assert alarm["message"] in result.stdout
