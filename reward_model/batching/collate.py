# SPDX-License-Identifier: Apache-2.0
"""Collation of Comparisons into batches, and the loader that makes the batches of a plan."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader

from reward_model.batching.batch import Batch, Lists, PackedBatch, Pairs, Points, Tokens
from reward_model.batching.blocks import Blocks
from reward_model.batching.identity import text_digests
from reward_model.batching.layout import Layout
from reward_model.batching.merging import merge, place
from reward_model.batching.plan import MicroBatch
from reward_model.data.comparisons import Comparison, Comparisons

WORKERS = 2  # processes that prepare batches while the GPU computes


def collate(
    comparisons: Sequence[Comparison],
    layout: Layout,
    weight: float = 1.0,
    groups: Sequence[int] | np.ndarray | None = None,
    row_weights: Sequence[float] | np.ndarray | None = None,
    identified: bool = False,
) -> Batch:
    """Merge Comparisons that share a prompt, and write them into a batch.

    Args:
        weight: The weight of the batch's mean loss in the step's.
        groups: As in :func:`reward_model.batching.merging.merge`.
        row_weights: The weight of each Comparison in that mean, in any unit. None means that all pairs weigh the same.
        identified: Say by what pairs and rows are known, for what is drawn for each of them. It is a quarter of the
            work.

    Example: a prompt of two tokens with two responses, of which the first was preferred.

    >>> rows = [Comparison([1, 2], [[3, 4], [5]], better=[0], worse=[1], margin=[0.5])]
    >>> batch = collate(rows, Layout("packed", pad=0))
    >>> batch.tokens.input_ids.tolist()
    [[1, 2, 3, 4, 5]]
    >>> batch.tokens.position_ids.tolist()  # both responses follow the prompt
    [[0, 1, 2, 3, 2]]
    >>> batch.tokens.ends.tolist()
    [3, 4]
    >>> batch.pairs.better.tolist(), batch.pairs.worse.tolist(), batch.pairs.margin.tolist()
    ([0], [1], [0.5])
    """
    if row_weights is None:
        row_weights = [max(len(c.better), 1) for c in comparisons]
    shares = np.array(row_weights, np.float64) / np.sum(row_weights)
    merged = merge(comparisons, layout, groups)
    placed = place(comparisons, merged, shares.tolist())
    rows = layout.rows([part.texts for part in merged])
    spans = [response for row in rows for c in row for response in c.responses]
    tokens = Tokens.collate(rows, layout, placed)
    digests = [text_digests(row.comparison) for row in placed] if identified else None
    columns = tokens.begin.numpy(), tokens.prompt_begin.numpy(), tokens.prompt_end.numpy()
    return Batch(
        tokens=tokens,
        pairs=Pairs.collate(placed, spans, digests),
        lists=Lists.collate(placed, digests),
        points=Points.collate(placed, digests),
        blocks=Blocks.of(*columns, layout.block) if layout.block > 1 else Blocks.none(),
        weight=weight,
    )


class PlannedBatches(Sequence[list[Batch]]):
    """The batches of a plan. Each item is the list of batches of one step, made when it is asked for."""

    def __init__(
        self,
        comparisons: Comparisons | Sequence[Comparison],
        plan: Sequence[list[MicroBatch]],
        layout: Layout,
        identified: bool = False,
    ):
        self.comparisons, self.plan, self.layout, self.identified = comparisons, plan, layout, identified

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> list[Batch]:  # type: ignore[override]  # no slices
        return [
            collate(rows, self.layout, m.weight, m.groups, m.row_weights, self.identified)
            for m, rows in ((m, [self.comparisons[row] for row in m.rows]) for m in self.plan[i])
        ]


class _Packed(Sequence[list[PackedBatch]]):
    """The same batches, packed, for processes that hand them to another."""

    def __init__(self, batches: PlannedBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> list[PackedBatch]:  # type: ignore[override]  # no slices
        return [batch.packed() for batch in self.batches[i]]


def loader(batches: PlannedBatches, on_gpu: bool, first: int = 0) -> DataLoader:
    """Load the items in order, from ``first`` on. Beside a GPU, other processes prepare and pack them ahead of time."""
    own = Generator()  # without it, the loader would draw from the random numbers that dropout takes
    order = range(first, len(batches))
    if not on_gpu:
        return DataLoader(batches, batch_size=None, sampler=order, generator=own)
    return DataLoader(
        _Packed(batches),
        batch_size=None,
        sampler=order,
        generator=own,
        num_workers=WORKERS,
        pin_memory=True,
        worker_init_fn=_leave_signals_to_the_run,
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """A request to end that reaches a whole process group is for the run, which still needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
