# SPDX-License-Identifier: Apache-2.0
"""The names of the objectives, by what they learn from."""

from __future__ import annotations

PAIR_LOSSES = ("logistic", "scaled", "hinge", "focal", "direct", "prior_length", "prior_cosine")
LIST_LOSSES = ("rank_list", "plackett_luce", "best_of_k")
POINT_LOSSES = ("mse", "mae", "huber", "bce", "ordinal")
LOSSES = (*PAIR_LOSSES, *LIST_LOSSES, *POINT_LOSSES)
ALIASES = {"pairwise": "logistic", "log_exp": "logistic", "bradley_terry": "logistic"}
PRIOR_SMALLEST = 0.001  # PCRM's β2: keeps the bound finite where two answers have nothing in common


def kind_of(name: str) -> str:
    """``pairs``, ``lists`` or ``points``: what an objective learns from."""
    return "pairs" if name in PAIR_LOSSES else "lists" if name in LIST_LOSSES else "points"
