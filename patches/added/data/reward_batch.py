# SPDX-License-Identifier: Apache-2.0
"""Pairs of step 2 to batches: no wider than their longest text, with the margins of a data column."""

import torch


def row_margin(row):
    """The number in a row's ``margin`` column as a 0-d tensor, NaN if there is none."""
    try:
        return torch.tensor(float(row["margin"]))
    except (KeyError, TypeError, ValueError):
        return torch.tensor(float("nan"))


class RewardCollator:
    """Rows of (chosen ids, chosen mask, rejected ids, rejected mask, margin) to a batch: chosen first, then rejected.

    Args:
        num_padding_at_beginning: the reward model's.
        margins_of: hand the rows' margins to the loss; all of these rows, the training set, have to have one.

    Raises:
        ValueError: rows without a margin.

    Every row is padded to ``--max_seq_len``. The columns that are pads in all rows are cut off, but for those in
    which the reward model may look for the end of the longest text: the scores, the loss and the gradients stay. (But
    for a row that begins with its final pad, or two rows of the same ids: of those, as upstream has it, the last column
    counts, and that is another one.)
    """

    def __init__(self, num_padding_at_beginning=0, margins_of=None):
        self.kept_pads = num_padding_at_beginning + 1
        self.with_margins = margins_of is not None
        if self.with_margins:
            missing = sum(not row[4].isfinite() for row in (margins_of[i] for i in range(len(margins_of))))
            if missing:
                raise ValueError(
                    f"--margin column: {missing} of {len(margins_of)} training rows have no number in a column margin"
                )

    def __call__(self, rows):
        ids = torch.cat([row[0] for row in rows] + [row[2] for row in rows])
        mask = torch.cat([row[1] for row in rows] + [row[3] for row in rows])
        used = mask.any(0).nonzero()  # padding on the right: the last used column is the longest text's end
        width = int(used[-1]) + 1 + self.kept_pads if len(used) else ids.shape[1]
        batch = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
        if self.with_margins:
            batch["margin"] = torch.stack([row[4] for row in rows])
        return batch
