# SPDX-License-Identifier: Apache-2.0
"""How alike the answers of a judged pair are: the cosine of their embeddings by a frozen encoder of sentences.

For the prior-constrained loss (PCRM, arXiv 2404.00978). An embedding is the mean over the last layer's tokens, as the
Sentence-Transformers models of this kind have it (all-MiniLM-L6-v2 and its relatives).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError, why_not
from reward_model.common.logging import logger
from reward_model.common.remote_code import never_asking
from reward_model.data.comparisons import Comparisons

BATCH = 64  # texts that are embedded at a time
ROWS = 1_000  # whose texts are held at a time


def with_cosines(
    comparisons: Comparisons,
    tokenizer: PreTrainedTokenizerBase,
    encoder: str,
    context: DistributedContext,
    trust_remote_code: bool = False,
) -> Comparisons:
    """Comparisons with a cosine for each judged pair. Every rank embeds a part of them.

    Args:
        tokenizer: of the rows, which are read back from their tokens.
        encoder: a folder or a hub name.
        trust_remote_code: run the code that the encoder brings.

    Raises:
        UserError: no such model.
    """
    try:
        with never_asking(trust_remote_code):
            words = AutoTokenizer.from_pretrained(encoder, trust_remote_code=trust_remote_code)
            model = AutoModel.from_pretrained(encoder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model = model.to(context.device).eval()
    except Exception as error:  # OSError, ValueError, KeyError: missing, unreachable, unknown architecture
        raise UserError(f"--prior_model {encoder}: {why_not(error)}") from error
    longest = min(words.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    order = np.argsort(comparisons.prompt_hashes(), kind="stable")  # answers that come again, one after the other
    mine = np.array_split(order, context.world_size)[context.rank]
    found = [
        _cosines([comparisons[row] for row in rows], tokenizer, words, model, longest)
        for rows in np.array_split(mine, max(1, len(mine) // ROWS))
    ]
    every = distributed.gather_rows(torch.cat(found)).cpu().numpy()
    starts = np.cumsum(comparisons.pairs) - comparisons.pairs
    places = np.concatenate([np.arange(starts[row], starts[row] + comparisons.pairs[row]) for row in order])
    cosines = np.empty(len(every), np.float32)
    cosines[places] = every
    logger.info(
        f"similarity of responses by {encoder}: "
        f"cosine {cosines.mean():.2f} ± {cosines.std():.2f} over {len(every)} pairs"
    )
    return comparisons.with_similarity(cosines)


@torch.no_grad()
def _cosines(rows, tokenizer, words, model, longest: int) -> torch.Tensor:
    """Of every judged pair of some rows, (p,)."""
    ids = [[(*row.prompt, *response)[row.prompt_tokens :] for response in row.responses] for row in rows]
    texts = sorted({text for own in ids for text in own}, key=len)
    place = {text: i for i, text in enumerate(texts)}
    embedded = []
    for first in range(0, len(texts), BATCH):
        answers = tokenizer.batch_decode([list(t) for t in texts[first : first + BATCH]], skip_special_tokens=True)
        batch = words(answers, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        states = model(**batch)[0]  # (b, s, h)
        mask = batch["attention_mask"].unsqueeze(-1)
        embedded.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    vectors = torch.cat(embedded)
    sides = [
        torch.tensor([place[own[i]] for own, row in zip(ids, rows) for i in side(row)], device=model.device).long()
        for side in (lambda row: row.better, lambda row: row.worse)
    ]
    return (vectors[sides[0]] * vectors[sides[1]]).sum(-1)
