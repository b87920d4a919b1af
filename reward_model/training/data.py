# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: read, tokenized, and found fit for its objective and its model."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.config.settings import Settings
from reward_model.data.chat_template import give_template, settle_template
from reward_model.data.comparisons import Comparisons
from reward_model.data.encoding import Encoding
from reward_model.data.preprocessing import PreprocessingConfig, load_answers, load_comparisons, load_shifted
from reward_model.data.sources import Splits
from reward_model.data.tokenizer import SpecialTokens, choose_special_tokens, load_tokenizer
from reward_model.data.weakest import NONE, Weakest, rearrange
from reward_model.models import pair_encoding
from reward_model.models.loading import most_tokens
from reward_model.objectives import answer_similarity
from reward_model.objectives.objective import Objective, missing_by


@dataclass(frozen=True)
class Data:
    """The rows of a run, tokenized.

    evaluation: name → rows of each evaluation set. The first one decides which weights are the best; a set that is
    named by none has the name ''. reference: those that scores are normalized by; None: they are not. longest: tokens
    of the longest text of all. weakest: what ``--flip_share`` and ``--drop_share`` came to. meta: the rows of
    ``--meta_data``; None: there are none.
    """

    encoding: Encoding
    train: Comparisons
    evaluation: dict[str, Comparisons]
    reference: Comparisons | None
    longest: int
    weakest: Weakest = NONE
    meta: Comparisons | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoding.tokenizer

    @property
    def special(self) -> SpecialTokens:
        return self.encoding.special

    @property
    def held_out(self) -> Comparisons:
        """The rows of the first evaluation set."""
        return next(iter(self.evaluation.values()))


def load_data(
    settings: Settings, config, objective: Objective, context: DistributedContext, is_trained: bool = False
) -> Data:
    """Read and tokenize what the run names, and check that the objective can learn from it.

    Args:
        config: of the model.
        is_trained: the model is a reward model already.

    Raises:
        UserError: unreadable or unusable data, or texts longer than the model's positions.
    """
    data, seed, normalize = settings.data, settings.training.seed, settings.output.normalize_scores
    model = settings.model
    tokenizer = load_tokenizer(model.model_name_or_path, data.add_eot_token, model.trust_remote_code)
    if data.chat_template:
        give_template(tokenizer, data.chat_template)
    if data.chat and not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer has no chat template; --chat_template gives it one")
    settle_template(tokenizer, datetime.datetime.now(), is_trained)
    text = config.get_text_config()
    special = choose_special_tokens(tokenizer, text.vocab_size, int(data.add_eot_token), may_grow=True)
    pairs = pair_encoding.for_training(
        data.pair_encoding, model.model_name_or_path, config, tokenizer, data.chat, is_trained, model.pooling,
        model.trust_remote_code,
    )  # fmt: skip
    if pairs:  # whether a tokenizer makes segment ids by default differs between Transformers 4 and 5: it is saved
        tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    preprocessing = PreprocessingConfig(
        max_seq_len=data.max_seq_len,
        on_bad_row=data.on_bad_row,
        cache=data.cache_folder,
        processes=data.num_proc,
        missing=missing_by(objective, data),
        names=data.names,
        splits=Splits(data.split, data.eval_split),
        chat=data.chat,
        pairs=pairs,
    )
    train, evaluation = load_comparisons(
        data.data_path,
        data.eval_sets,
        tokenizer,
        special,
        preprocessing,
        seed,
        data.data_split,
        (data.max_train_samples, data.max_eval_samples),
    )
    train, weakest = rearrange(train, data.flip_share, data.drop_share)
    for line in weakest.lines():
        logger.info(line)
    if doubt := weakest.doubt():
        logger.warning(doubt)
    objective.require_rows(train)
    known = {None: None, "train": train, "eval": next(iter(evaluation.values()))}
    if normalize is None or normalize in known:
        reference = known[normalize]
    else:
        reference = load_answers(normalize, tokenizer, special, preprocessing, seed)
    meta = load_shifted(data.meta_data, tokenizer, special, preprocessing, seed) if data.meta_data else None
    parts = (train, *evaluation.values(), *(part for part in (reference, meta) if part is not None))
    longest = int(max(part.lengths.max() for part in parts))
    require_positions(text, tokenizer, longest)
    if "prior_cosine" in objective.kinds:
        assert settings.loss.prior_model is not None  # refused before
        train = answer_similarity.with_cosines(
            train, tokenizer, settings.loss.prior_model, context, model.trust_remote_code
        )
    return Data(Encoding(tokenizer, special, pairs), train, evaluation, reference, longest, weakest, meta)


def require_positions(config, tokenizer, longest: int) -> None:
    """Raises UserError if the longest text has more tokens than the model or its tokenizer takes."""
    most, whose = most_tokens(config, tokenizer)
    if most < longest:
        raise UserError(f"the longest text has {longest} tokens, and {whose} {most}: --max_seq_len {most}")
