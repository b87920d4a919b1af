# SPDX-License-Identifier: Apache-2.0
"""EX2's density: how well a classifier that is shown a text tells it from the training texts."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import softplus

from reward_model.novelty.density import Density, Whitening

DIRECTIONS = 64  # the noise of so many directions is far from each text, and not so far that telling is trivial
HIDDEN = 64
NOISE = 1.0  # of positives, in standard deviations of the training states: it sets the smoothing
STEPS, PAIRS, RATE = 1_000, 256, 3e-3  # of AdamW, whatever the number of texts


class Classifier(nn.Module):
    """D(x*, x), as its logit: is x the exemplar x*, up to noise, and no other text?

    logit D(x*, x) = f(x) − Σ_k w_k (x*_k − x_k)², f(x) = Σ_k a_k x_k² + MLP(x)

    The best D has the logit log N(x; x*, σ²) − log p(x), with Fu et al.'s noise on the exemplar: a quadratic of the
    difference, and a function of x that is −log p. It starts where p is the Gaussian of the whitened states, a = ½,
    w = 1 / 2σ², and the MLP at 0; all of it is learned.
    """

    def __init__(self, directions: int, hidden: int = HIDDEN, noise: float = NOISE):
        super().__init__()
        self.log_w = nn.Parameter(torch.full((directions,), -math.log(2 * noise**2)))
        self.log_a = nn.Parameter(torch.full((directions,), math.log(0.5)))
        self.mlp = nn.Sequential(nn.Linear(directions, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, exemplars: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The logits of pairs of whitened states (n, k), (n,)."""
        return self.own(states) - ((exemplars - states).square() * self.log_w.exp()).sum(1)

    def own(self, states: torch.Tensor) -> torch.Tensor:
        """The logit of each of some whitened states (n, k) with itself as the exemplar, (n,)."""
        return self.mlp(states).squeeze(1) + (states.square() * self.log_a.exp()).sum(1)


class ExemplarClassifier(Density):
    """−log p(x) = log D(x, x) − log(1 − D(x, x)), the classifier's own logit where a state is its own exemplar.

    EX2 (Fu, Co-Reyes, Levine 2017, arXiv 1703.01260): a classifier D that is told an exemplar x* from the rest gives
    p(x*) = (1 − D(x*)) / D(x*); amortized, one network D(x*, x) learns all exemplars by balanced binary cross-entropy,
    here with noise added to the positives: x* + σε against x* and another training state. Unlike there, no exemplar is
    new while D is trained (nothing is trained when a text is scored), D works on frozen states in the first 64 whitened
    directions in place of a variational encoder, and it has the form of the best D (:class:`Classifier`).
    """

    name: ClassVar[str] = "exemplar"

    def __init__(self, whitening: Whitening, classifier: Classifier):
        self.whitening, self.classifier = whitening, classifier.eval().requires_grad_(False)

    @classmethod
    def fit(cls, states: torch.Tensor, seed: int, heads: torch.Tensor | None = None) -> ExemplarClassifier:
        whitening = Whitening.of(states, DIRECTIONS)
        known = whitening(states, DIRECTIONS)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            classifier = Classifier(known.shape[1])
        nn.init.zeros_(classifier.mlp[2].weight)
        nn.init.zeros_(classifier.mlp[2].bias)
        optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        with torch.enable_grad():
            for _ in range(STEPS):
                exemplars, others = (known[torch.randint(len(known), (PAIRS,), generator=generator)] for _ in range(2))
                noise = NOISE * torch.randn(exemplars.shape, generator=generator)
                loss = balanced_cross_entropy(classifier(exemplars, exemplars + noise), classifier(exemplars, others))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return cls(whitening, classifier)

    @torch.no_grad()
    def energy(self, states: torch.Tensor) -> torch.Tensor:
        return self.classifier.to(states.device).own(self.whitening(states, DIRECTIONS))

    def tensors(self) -> dict[str, torch.Tensor]:
        of_classifier = {f"classifier.{name}": value for name, value in self.classifier.state_dict().items()}
        return self.whitening.tensors() | of_classifier

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> ExemplarClassifier:
        classifier = Classifier(len(tensors["classifier.log_w"]), tensors["classifier.mlp.0.weight"].shape[0])
        classifier.load_state_dict(part_of(tensors, "classifier."))
        return cls(Whitening.of_tensors(tensors), classifier)


def balanced_cross_entropy(positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """−½ mean log D(x*, x* + noise) − ½ mean log(1 − D(x*, x)), of logits (n,) each: log 2 where all are 0."""
    return 0.5 * (softplus(-positives).mean() + softplus(negatives).mean())


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose name begins with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
