# SPDX-License-Identifier: Apache-2.0
"""Judgements that are repeated, contradict each other, or go round in a circle; and rows in both sets.

Notation: p pairs, d distinct judgements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from reward_model.doctor.findings import EXAMPLES, Finding, level_of, part
from reward_model.doctor.ledger import Ledger, joint
from reward_model.doctor.near import groups
from reward_model.doctor.reading import EVALUATION, SETS, TRAINING


@dataclass
class Judgements:
    """What was judged in one set.

    rows: of each pair, (p,). prompts, better, worse: keys, (p,). near: the same, where texts that are nearly alike have
    the same key.
    """

    rows: np.ndarray
    prompts: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    near: tuple[np.ndarray, np.ndarray, np.ndarray]

    @cached_property
    def forward(self) -> np.ndarray:
        return joint(self.prompts, self.better, self.worse)

    @cached_property
    def backward(self) -> np.ndarray:
        return joint(self.prompts, self.worse, self.better)

    @cached_property
    def repeated(self) -> np.ndarray:
        """Pairs that say again what a pair before them says, places."""
        _, firsts = np.unique(self.forward, return_index=True)
        return np.setdiff1d(np.arange(len(self.forward)), firsts, assume_unique=True)

    @cached_property
    def repeated_of(self) -> np.ndarray:
        """Of each of these the first pair that says the same, places."""
        _, firsts, numbers = np.unique(self.forward, return_index=True, return_inverse=True)
        return firsts[numbers[self.repeated]]

    @cached_property
    def contradicted(self) -> np.ndarray:
        """Pairs whose opposite is there, too, (p,) truth values."""
        return np.isin(self.forward, self.backward) & ~self.same

    @cached_property
    def same(self) -> np.ndarray:
        """Whether the two answers of a pair are the same but for white space, (p,)."""
        return self.better == self.worse

    @cached_property
    def alike(self) -> np.ndarray:
        """Whether the two answers of a pair are nearly alike and not the same, (p,)."""
        return (self.near[1] == self.near[2]) & ~self.same

    @cached_property
    def contradicted_by(self) -> np.ndarray:
        """Of each of these the first pair that says the opposite, places."""
        return first_of(self.backward[self.contradicted], self.forward)

    @cached_property
    def near_repeated(self) -> np.ndarray:
        """Distinct judgements that are nearly another one's before them, whichever answer won, places of pairs."""
        return self._near[0]

    @cached_property
    def near_repeated_of(self) -> np.ndarray:
        """Of each of these the first pair that is nearly the same, places."""
        return self._near[1]

    @cached_property
    def _near(self) -> tuple[np.ndarray, np.ndarray]:
        distinct = np.sort(np.unique(self.forward, return_index=True)[1])
        unordered = self.unordered_near[distinct]
        exact = self.unordered[distinct]
        _, firsts, numbers = np.unique(unordered, return_index=True, return_inverse=True)
        first = firsts[numbers]
        is_other = exact != exact[first]  # the same two answers swapped are no near duplicates
        return distinct[is_other], distinct[first[is_other]]

    @cached_property
    def unordered(self) -> np.ndarray:
        return joint(self.prompts, *_sorted(self.better, self.worse))

    @cached_property
    def unordered_near(self) -> np.ndarray:
        return joint(self.near[0], *_sorted(*self.near[1:]))

    @cached_property
    def cycles(self) -> np.ndarray:
        """Places of pairs that go round, A before B before C before A; without those that contradict each other.

        Each prompt's answers are the nodes of a graph, and each judgement goes from the better to the worse. In a
        strongly connected component of three or more, every judgement is part of a circle.
        """
        kept = np.flatnonzero(~self.contradicted & ~self.same)
        ends = [joint(self.prompts[kept], side[kept]) for side in (self.better, self.worse)]
        nodes, numbers = np.unique(np.concatenate(ends), return_inverse=True)
        start, end = numbers[: len(kept)], numbers[len(kept) :]
        graph = coo_matrix((np.ones(len(kept), np.int8), (start, end)), shape=(len(nodes), len(nodes)))
        components = connected_components(graph, directed=True, connection="strong")[1]
        return kept[components[start] == components[end]]

    @cached_property
    def circle_count(self) -> int:
        """How many groups of answers go round."""
        ends = [joint(self.prompts[self.cycles], side[self.cycles]) for side in (self.better, self.worse)]
        nodes, numbers = np.unique(np.concatenate(ends), return_inverse=True)
        count = len(self.cycles)
        graph = coo_matrix((np.ones(count, np.int8), (numbers[:count], numbers[count:])), shape=(len(nodes),) * 2)
        return int(connected_components(graph, directed=False)[0]) if count else 0


def first_of(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each of some keys, all of which are known, the first place in ``known`` (n,) that has it."""
    found, firsts = np.unique(known, return_index=True)
    return firsts[np.searchsorted(found, keys)]


def _sorted(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(one, other), np.maximum(one, other)


class Near:
    """For each key of a text the key of its group, which is the lowest of those that are nearly alike."""

    def __init__(self, ledger: Ledger):
        self.of_prompts = _representatives(*ledger.prompts.distinct())
        self.of_texts = _representatives(*ledger.texts.distinct())

    def prompts(self, keys: np.ndarray) -> np.ndarray:
        return _replaced(keys, *self.of_prompts)

    def texts(self, keys: np.ndarray) -> np.ndarray:
        return _replaced(keys, *self.of_texts)


def _representatives(keys: np.ndarray, signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (t,), sorted, and for each the lowest of its group."""
    if not len(keys):
        return keys, keys
    numbers = groups(signatures)
    _, firsts = np.unique(numbers, return_index=True)  # of sorted keys the first is the lowest
    return keys, keys[firsts[numbers]]


def _replaced(keys: np.ndarray, known: np.ndarray, by: np.ndarray) -> np.ndarray:
    if not len(known):
        return keys
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, by[places], keys)


def judgements_of(ledger: Ledger, near: Near, of_set: int) -> Judgements:
    """Those of the training rows, or of those to evaluate on."""
    mask = ledger.pair_sets() == of_set
    prompts, better, worse = (
        each[mask] for each in (ledger.pair_prompts(), ledger.pair_array("better"), ledger.pair_array("worse"))
    )
    alike = near.prompts(prompts), near.texts(better), near.texts(worse)
    return Judgements(ledger.pair_array("row")[mask], prompts, better, worse, alike)


def examples(ledger: Ledger, rows: np.ndarray, partners: np.ndarray | None = None, word: str = "as") -> list[str]:
    """The first of some rows, in words, and with which other row of ``partners`` each of them is found."""
    each, firsts = (found[:EXAMPLES] for found in np.unique(rows, return_index=True))
    said = [ledger.origin(int(row)) for row in each]
    if partners is None:
        return said
    return [f"{one} ({word} {ledger.beside(int(p), int(row))})" for one, row, p in zip(said, each, partners[firsts])]


def findings_within(ledger: Ledger, found: Judgements, of_set: int) -> Iterator[Finding]:
    """Of one set: what is there twice, contradicts itself, or goes round."""
    total = len(found.rows)
    if not total:
        return
    of = "" if of_set == TRAINING else f"{SETS[of_set]}: "
    prefix = "" if of_set == TRAINING else f"{SETS[of_set]}_"

    def of_pairs(
        name: str,
        places: np.ndarray,
        line: str,
        advice: str,
        doubtful: float,
        hurts: float,
        partners: np.ndarray | None = None,
        word: str = "as",
    ) -> Finding:
        count = len(places)
        level = level_of(count / total, doubtful, hurts)
        rows = examples(ledger, found.rows[places], None if partners is None else found.rows[partners], word)
        return Finding(
            prefix + name,
            level,
            of + line.format(part(count, total, "pair")),
            advice if count else "",
            count,
            total,
            rows=rows,
        )

    how = " (--drop_repetitions)" if of_set == TRAINING else ""
    yield of_pairs(
        "duplicates",
        found.repeated,
        "{} repeat a judgement that is already there, but for white space",
        f"each repetition weighs the pair once more: keep one{how}, unless several people judged it",
        0.01,
        0.05,
        found.repeated_of,
    )
    yield of_pairs(
        "near_duplicates",
        found.near_repeated,
        "{} are nearly another one: prompt and both answers share four fifths of their stretches of 5 characters",
        "look at some; forms that are filled in, such as sums, look alike and are not",
        0.05,
        0.5,
        found.near_repeated_of,
        "like",
    )
    yield of_pairs(
        "contradictions",
        np.flatnonzero(found.contradicted),
        "{} are contradicted: the same two answers to the same prompt are there in the other order, too",
        "keep the order that more judges gave, write the share of the votes as the probability, or leave both out",
        0.0,
        0.01,
        found.contradicted_by,
        "against",
    )
    yield of_pairs(
        "same",
        np.flatnonzero(found.same),
        "{} have two answers that differ in white space alone",
        "white space is all that can be learned from them: leave them out",
        0.0,
        0.01,
    )
    circles = found.circle_count
    yield of_pairs(
        "cycles",
        found.cycles,
        f"{{}} lie on {circles:,} circle{'' if circles == 1 else 's'}, as A before B before C before A",
        "no scores satisfy all of a circle, though one wrong judgement may close it: a few are usual among people",
        0.01,
        1.0,
    )
    yield of_pairs(
        "alike",
        np.flatnonzero(found.alike),
        "{} have two answers that are nearly alike",
        "little can be learned from them; where a word decides, as in sums or code, they are right as they are",
        0.1,
        0.5,
    )


def findings_across(ledger: Ledger, train: Judgements, held: Judgements, near: Near) -> Iterator[Finding]:
    """What is in both sets."""
    prompts, sets = ledger.row_array("prompt"), ledger.row_array("set")
    trained, of_held = np.flatnonzero(sets == TRAINING), np.flatnonzero(sets == EVALUATION)
    of_train = prompts[trained]
    if not len(of_held):
        return
    total = len(of_held)
    asked = np.isin(prompts[of_held], of_train)
    yield Finding(
        "prompts_in_both",
        level_of(asked.mean(), 0.0, 0.05),
        f"{part(int(asked.sum()), total, 'evaluation row')} have a prompt that training rows have, too",
        "hold whole prompts out: a model that has seen the prompt is judged too well" if asked.any() else "",
        int(asked.sum()),
        total,
        rows=examples(ledger, of_held[asked], trained[first_of(prompts[of_held[asked]], of_train)]),
    )
    near_train, near_held = near.prompts(of_train), near.prompts(prompts[of_held])
    like = np.isin(near_held, near_train) & ~asked
    yield Finding(
        "near_prompts_in_both",
        level_of(like.mean(), 0.01, 1.0),  # doubtful at most: they may be made from one form
        f"{part(int(like.sum()), total, 'evaluation row')} have a prompt that is nearly one of the training rows'",
        "look at some; prompts made from one form look alike and are not" if like.any() else "",
        int(like.sum()),
        total,
        rows=examples(ledger, of_held[like], trained[first_of(near_held[like], near_train)], "like"),
    )
    if not len(held.rows):
        return
    exact = np.isin(held.unordered, train.unordered)
    yield Finding(
        "pairs_in_both",
        level_of(exact.mean(), 0.0, 0.001),
        f"{part(int(exact.sum()), len(exact), 'evaluation pair')} are training pairs, too",
        "take them out of the training rows: what is measured on them is memory" if exact.any() else "",
        int(exact.sum()),
        len(exact),
        rows=examples(ledger, held.rows[exact], train.rows[first_of(held.unordered[exact], train.unordered)]),
    )
    nearly = np.isin(held.unordered_near, train.unordered_near) & ~exact
    yield Finding(
        "near_pairs_in_both",
        level_of(nearly.mean(), 0.005, 0.05),
        f"{part(int(nearly.sum()), len(nearly), 'evaluation pair')} are nearly training pairs",
        "look at some, and take those that are the same out of the training rows" if nearly.any() else "",
        int(nearly.sum()),
        len(nearly),
        rows=examples(
            ledger,
            held.rows[nearly],
            train.rows[first_of(held.unordered_near[nearly], train.unordered_near)],
            "like",
        ),
    )
