# SPDX-License-Identifier: Apache-2.0
"""Every text model that Transformers has, small: made, trained for a step, saved and loaded again.

python tests/helpers/architectures.py [--write] [TYPE …]

A line for each type; without types, for all. --write makes tests/architectures.md of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny
import torch
import transformers
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reward_model.common.errors import UserError
from reward_model.inference import load
from reward_model.models import saving
from reward_model.models.attention import SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import load_for_training
from reward_model.models.lora import add_lora

SIZES = {  # what configurations call their sizes
    **dict.fromkeys(("vocab_size", "n_vocab", "n_words", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "model_dim", "n_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "qk_nope_head_dim", "v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state", "state_size", "lora_rank_decay"), 16),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 64),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_dense_layers"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    "word_embed_proj_dim": 32, "pooler_hidden_size": 32, "rotary_dim": 8,
}  # fmt: skip
NOT_TEXT = ("vision", "audio", "image", "speech", "video", "clip", "whisper", "wav2vec", "hubert", "detr", "vit", "sam")
LIMIT = 30_000_000  # parameters of what is still called small


@dataclass
class Outcome:
    """What became of a model type. line: what a user would be told; empty: it works."""

    kind: str
    form: str = ""
    attention: str = ""
    plain: str = ""
    lora: str = ""

    def row(self) -> str:
        return f"| {self.kind} | {self.form} | {self.attention} | {self.plain} | {self.lora} |"


def sizes_of(config) -> dict:
    """Small sizes under whichever names a configuration has, and those inside it."""
    have, found = vars(config), {}
    for name, value in have.items():
        if isinstance(value, transformers.PretrainedConfig):
            found[name] = sizes_of(value)
        elif name in SIZES and (value is not None or name in ("num_experts_per_tok", "sliding_window")):
            found[name] = SIZES[name]
    found |= {
        alias: SIZES[alias] for alias, name in config.attribute_map.items() if alias in SIZES and name not in found
    }
    layers = getattr(config, "num_hidden_layers", 0) or 0
    for name, value in have.items():  # one entry a layer
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            found[name] = value[:1] + value[-1:]
    rope = have.get("rope_parameters")
    if "kv_lora_rank" in found and "num_key_value_heads" in found:  # latent attention has a key for each head
        found["num_key_value_heads"] = found["num_attention_heads"]
    if isinstance(rope, dict) and any(word in config.model_type for word in ("glm", "_vl", "qwen2_5_omni")):
        half = [1, 1, 0] if "glm4v_moe" in config.model_type else [2, 1, 1]  # of the dimensions that are rotated
        found["rope_parameters"] = rope | {"mrope_section": half}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_start_token_id"] = 1
    return found | {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}


def make(kind: str, folder: Path):
    """A small model of a type in a folder, with a tokenizer; None: none could be made."""
    config = CONFIG_MAPPING[kind]
    config = config(**sizes_of(config()))
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32)
    if sum(p.numel() for p in model.parameters()) > LIMIT:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.save_pretrained(folder)
    tiny.tokenizer(folder)
    return model


def try_out(folder: Path, out: Path, lora: int) -> tuple[str, str]:
    """Train a step, save, load again: the form that was saved, and which attention it took.

    Raises:
        UserError: what a user would be told.
        AssertionError: scores that are not those of the trained model.
    """
    scorer = load_for_training(str(folder), torch.float32, seed=0)
    tokenizer = tiny.tokenizer()
    for part in (scorer.config, scorer.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    if lora:
        add_lora(scorer, lora, lora, None)
    forward = ForwardPass(scorer, scorer, torch.float32, torch.device("cpu"), tokenizer.pad_token_id)
    forward.require_scores(tokenizer.eos_token_id)
    forward.choose_attention(80)  # beyond a window of 64
    taken = forward.attention.name
    forward.use(SEPARATE)
    texts = [[*range(5, 5 + length), 0] for length in (6, 9)]
    ids = torch.tensor([texts[0] + [1] * 3, texts[1]])
    mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 10])
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], lr=1e-3)
    scores = scorer.train()(ids, mask, torch.tensor([6, 19]))
    (scores[0] - scores[1]).square().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in scorer.parameters()), "no gradient"
    optimizer.step()
    trained = scorer.eval()(ids, mask, torch.tensor([6, 19])).detach()
    assert torch.isfinite(trained).all(), "scores are not finite"
    single = torch.cat([scorer(torch.tensor([t]), torch.ones(1, len(t)), torch.tensor([len(t) - 1])) for t in texts])
    pads = "" if torch.allclose(trained, single, atol=1e-4) else ", pads change scores"
    saving.save(scorer, tokenizer, out)
    again = torch.tensor(load(out).score_ids(texts, batch_size=1 if pads else 16))
    trained = single.detach() if pads else trained
    assert torch.allclose(trained, again, atol=1e-4), f"saved scores differ by {(trained - again).abs().max():.2g}"
    form = "modules" if (out / "modules.json").is_file() else "Transformers'"
    return form + pads, taken


def outcome(kind: str) -> Outcome | None:
    """What becomes of a type; None: it is no text model that could be made small."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, found = Path(place, "model"), Outcome(kind)
        try:
            if make(kind, folder) is None:
                return None
        except Exception:  # whatever a configuration of other sizes than its own raises
            return None
        for name, lora in (("plain", 0), ("lora", 4)):
            try:
                found.form, found.attention = try_out(folder, Path(place, name), lora)
                setattr(found, name, "works")
            except UserError as error:
                setattr(found, name, str(error).replace(place, "").replace("|", "/"))
            except Exception as error:  # a traceback, as a user would see one
                line = (str(error).splitlines() or [""])[0][:120].replace("|", "/").replace(place, "")
                setattr(found, name, f"TRACEBACK {type(error).__name__}: {line}")
    return found


def text_types() -> list[str]:
    names = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    return [kind for kind in sorted(names) if not any(word in kind for word in NOT_TEXT)]


HEADER = """# Architectures

Every type of model in `AutoModel` of Transformers {version} that reads text and that could be made small: made with
random weights, trained for a step on two texts of different lengths, saved, loaded by
`reward_model.inference.load`, and scored again (differences up to 1e-4 pass). There are {count} types, and
{works} of them work, with LoRA, too. A few of the others are refused for sizes that the small configuration gave them.
`python tests/helpers/architectures.py --write` made this table; torch {torch}, on a CPU.

- form: `Transformers'`, which `AutoModelForSequenceClassification` loads, or `modules` of Sentence-Transformers where
  Transformers has no class.
- attention: which of the [ways to stand in rows](../reward_model/README.md#batches-and-speed) a CPU takes: `slices` and
  `dense` share prompts, `varlen` writes texts into one row without pads, `separate` pads them.
- Otherwise the line that a user is told.

| type | form | attention | without LoRA | with LoRA |
|---|---|---|---|---|
"""


def table(found: list[Outcome], unmade: list[str]) -> str:
    """The page of all outcomes: those that work first."""
    other_input = [each for each in found if each.plain.endswith("and no text")]
    works = [each for each in found if each.plain == each.lora == "works"]
    others = [each for each in found if each not in works and each not in other_input]
    head = HEADER.format(
        version=transformers.__version__, torch=torch.__version__, count=len(works) + len(others), works=len(works)
    )
    rows = "".join(each.row() + "\n" for each in (*works, *others))
    no_text = f"Refused because they read images, sound or numbers: {', '.join(each.kind for each in other_input)}."
    return f"{head}{rows}\n{no_text}\n\nNo small model of these could be made here: {', '.join(unmade)}.\n"


def main(words: list[str]) -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
    found, unmade = [], []
    for kind in [word for word in words if word != "--write"] or text_types():
        result = outcome(kind)
        if result is None:
            unmade.append(kind)
        else:
            found.append(result)
            print(result.row(), flush=True)
    print("not made small:", ", ".join(unmade))
    if "--write" in words:
        Path(__file__).resolve().parents[1].joinpath("architectures.md").write_text(table(found, unmade))


if __name__ == "__main__":
    main(sys.argv[1:])
