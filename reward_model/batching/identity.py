# SPDX-License-Identifier: Apache-2.0
"""What a judged pair or a row is known by, wherever it stands: a number made of the token ids of its texts.

Whatever is drawn for a row by this number is the same for any order of the data, any merging of prompts, any number of
ranks, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from reward_model.data.comparisons import Comparison


def text_digests(row: Comparison) -> list[bytes]:
    """Of the whole text of each response, 8 bytes. Where its prompt ends makes no difference."""
    return [_digest(np.array(row.prompt + response, "<i4").tobytes()) for response in row.responses]


def pair_identities(row: Comparison, texts: list[bytes]) -> list[int]:
    """Of each judged pair an int64, of the better text and the other one, in this order.

    Args:
        texts: as :func:`text_digests` gives them.
    """
    return [_number(texts[better] + texts[worse]) for better, worse in zip(row.better, row.worse)]


def row_identity(row: Comparison, texts: list[bytes]) -> int:
    """An int64 of all texts of a row, the best first, in whatever order the row has them.

    That of a row of two answers, one of which is the better one, is the pair's.
    """
    ranks = row.ranks or [row.worse.count(k) for k in range(len(texts))]
    return _number(b"".join(text for _, text in sorted(zip(ranks, texts))))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _number(content: bytes) -> int:
    return int.from_bytes(_digest(content), "little", signed=True)


def seeded(parts: Iterable[object]) -> int:
    """An int64 that follows from some values, such as a seed and what it is for; equal on every machine."""
    return _number(" ".join(map(str, parts)).encode())
