# SPDX-License-Identifier: Apache-2.0
"""TRL at work: it trains reward models on, scores with them in GRPO and RLOO, and trains its own."""

import torch
from answers import answer_all
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, __version__

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1, "max_steps": 1}


def rows(asked):
    names = [name for name in ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids") if name in asked]
    return Dataset.from_dict({name: asked[name] for name in names})


def trainer(asked, model, **options):
    """A RewardTrainer whose first step is all rows at once."""
    data = rows(asked)
    settings = RewardConfig(
        output_dir=asked["output"],
        per_device_train_batch_size=len(data),
        per_device_eval_batch_size=len(data),
        learning_rate=1e-3,
        max_length=None,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": asked.get("dtype", "float32")} if isinstance(model, str) else None,
        **QUIET | {"max_steps": asked.get("steps", 1)},
    )
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    return RewardTrainer(
        model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **options
    )


def go_on(asked):
    """The loss and mean reward before a step, and the loss of the first step."""
    model = asked["folder"]
    if adapter := asked.get("adapter"):
        base = AutoModelForSequenceClassification.from_pretrained(asked["base"], num_labels=1)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    its = trainer(asked, model)
    before = its.evaluate()
    its.train()
    losses = [entry["loss"] for entry in its.state.log_history if "loss" in entry]
    return {
        "version": __version__,
        "eval_loss": before["eval_loss"],
        "mean": before["eval_mean_reward"],
        "losses": losses,
    }


def train(asked):
    """A model, or an adapter, that TRL trains from a model without a head, and its own scores of some ids."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **asked["lora"]) if "lora" in asked else None
    its = trainer(asked, asked["folder"], **({"peft_config": lora} if lora else {}))
    its.train()
    its.save_model(asked["output"])
    model = its.model.eval()
    with torch.no_grad():
        scores = [model(torch.tensor([ids])).logits[0, 0].item() for ids in asked["ids"]]
    return {"version": __version__, "scores": scores}


def reward(asked):
    """One step of GRPO or RLOO with a model by its path and by our callable: what was scored, and the scores."""
    from reward_model.inference import load

    kind, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[asked["trainer"]]
    functions = [load(asked["folder"])]
    if asked["by_path"]:
        functions.insert(0, asked["folder"])
    its = kind(
        model=AutoModelForCausalLM.from_pretrained(asked["policy"], dtype=torch.float32),
        reward_funcs=functions,
        args=settings(
            output_dir=asked["output"],
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=12,
            **QUIET | {"gradient_checkpointing": False},
        ),
        train_dataset=Dataset.from_dict({"prompt": asked["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(asked["policy"]),
    )
    seen = {"prompts": [], "completions": [], "rewards": []}
    calculate = its._calculate_rewards

    def watched(inputs, prompts, completions, *rest):
        found = calculate(inputs, prompts, completions, *rest)
        seen["prompts"] += prompts
        seen["completions"] += completions
        seen["rewards"] += found.tolist()
        return found

    its._calculate_rewards = watched
    its.train()
    logged = next(entry for entry in its.state.log_history if "reward" in entry)
    means = {name: value for name, value in logged.items() if name.startswith("rewards/") and name.endswith("/mean")}
    return dict(version=__version__, logged=means, **seen)


DO = {"go_on": go_on, "train": train, "reward": reward}

if __name__ == "__main__":
    answer_all(lambda question: DO[question["do"]](question))
