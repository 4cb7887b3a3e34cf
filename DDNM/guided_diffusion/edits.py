"""Attributes set by name, ``--set NAME=VALUE``, and how the other logits follow."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import InputError, nearest

CONTRADICTION = 0.3  # chosen on drawn faces of seed 26, as KEPT is, see docs/guidance.md
KEPT = 0.3
AT_MOST = 0.5  # what is worth keeping
Contradictions = Mapping[str, Mapping[str, float]]


def contradictions(labels: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What is seldom seen together: ``{"Wearing_Hat=1": {"Bangs=1": 0.0}}``, for b beside a ``P(b | a) / P(b)``.

    Args:
        labels: (N, d), 0 or 1. names: of the d attributes.
    """
    states = torch.cat([1 - labels, labels], 1).double()  # (N, 2 d)
    share, together = states.mean(0), states.T @ states / len(states)
    times = (together / share[:, None] / share).tolist()  # NaN for what is never seen
    named = [f"{name}={value}" for value in (0, 1) for name in names]
    return {
        a: found
        for a, row in zip(named, times, strict=True)
        if (found := {b: round(x, 3) for b, x in zip(named, row, strict=True) if x < AT_MOST and b[:-1] != a[:-1]})
    }


@dataclass(frozen=True)
class Edits:
    """Logits that targets are given, whatever the image's own are.

    The others follow, so that a target stays one that a face can have:

    - A state, present or absent, that the labels have less than ``contradiction`` times as often beside an edit (see
      `contradictions`) contradicts it: the attribute's logit is brought to the typical one of the other state, or stays
      beyond it. So a hat takes away bangs that it would cover.
    - The rest r moves to where it is nearest, in Mahalanobis distance by the covariance S of g's logits, for the logits
      f that were set: ``y'_r = y_r + S_rf S_ff^-1 (y'_f - y_f)``, which is the mean of a normal r if f is known. No
      attribute changes its state by that, nor comes nearer to 0 than it was, or than `KEPT` of its typical logit.

    Attributes:
        logits: attribute's index -> its logit.
        names: of all attributes, (d,).
        typical: each attribute's typical logits, (d, 2), without and with it.
        seldom: `contradictions`. covariance: S, (d, d). None, or nothing: nothing follows in that way.
        contradiction: see above; 0: nothing follows at all.
    """

    logits: dict[int, float]
    names: Sequence[str]
    typical: Tensor | None
    seldom: Contradictions
    covariance: Tensor | None
    contradiction: float

    @classmethod
    def parse(
        cls, assignments: Sequence[str], names: Sequence[str], notes: Mapping, contradiction: float = CONTRADICTION
    ) -> "Edits":
        """Of ``NAME=VALUE`` strings.

        Args:
            notes: of the SPNN's config.json: ``typical_logits``, ``contradictions`` and ``covariance``, if it has them.

        Raises:
            InputError: an attribute that does not exist (with the nearest match), or a value that is no number.
        """
        typical = notes.get("typical_logits")
        typical = None if typical is None else torch.tensor(typical)
        covariance = None if typical is None else notes.get("covariance")
        covariance = None if covariance is None else torch.tensor(covariance, dtype=torch.float64)
        logits = {}
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            if name not in names:
                raise InputError(f"--set {assignment}: no attribute {name!r}{nearest(name, names)}")
            index = list(names).index(name)
            if value in ("0", "1") and typical is None:
                raise InputError(f"--set {assignment}: these weights record no typical logits; give one: {name}=+4")
            try:
                logits[index] = typical[index, int(value)].item() if value in ("0", "1") else float(value)
            except ValueError:
                logits[index] = math.nan
            if not torch.tensor(logits[index]).isfinite():  # in float32: 1e99 is none
                raise InputError(f"--set {assignment}: {value!r} is neither 0, 1 nor a logit such as {name}=+4")
        return cls(logits, names, typical, notes.get("contradictions", {}), covariance, contradiction)

    def apply(self, logits: Tensor, judged: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Edited targets (N, d), what the judge should see of them (N, d), and whose state followed, (N, d) bool."""
        if not self.logits:  # measurements of any shape may come
            return logits, judged, torch.zeros_like(logits, dtype=torch.bool)
        before, logits, edited = logits, logits.clone(), list(self.logits)
        index = {name: i for i, name in enumerate(self.names)}
        for i, logit in self.logits.items():
            for state, times in self.seldom.get(f"{self.names[i]}={int(logit > 0)}", {}).items():
                name, _, value = state.rpartition("=")
                if times < self.contradiction and self.typical is not None:
                    bound = self.typical[index[name], 1 - int(value)].item()
                    logits[:, index[name]].clamp_(**({"max": bound} if value == "1" else {"min": bound}))
        logits[:, edited] = logits.new_tensor(list(self.logits.values()))
        followed = (logits > 0) != (before > 0)
        followed[:, edited] = False
        if self.covariance is not None and self.contradiction > 0:
            given = followed.clone()
            given[:, edited] = True
            logits = torch.where(given, logits, self._nearest(logits, logits - before, given))
        if judged is not None:
            judged = torch.where(followed, logits, judged)
            judged[:, edited] = logits[:, edited]
        return logits, judged, followed

    def _nearest(self, logits: Tensor, change: Tensor, given: Tensor) -> Tensor:
        """Logits (N, d) that follow the change (N, d) of those that are ``given``, (N, d) bool; see the class."""
        assert self.covariance is not None and self.typical is not None
        f, change = given.double().cpu(), change.double().cpu()  # where float64 can be had
        inverse = torch.linalg.pinv(self.covariance * f[:, :, None] * f[:, None], hermitian=True)  # S_ff^-1, else 0
        moved = logits + ((inverse @ change[:, :, None])[..., 0] @ self.covariance).to(logits)
        present, typical = logits > 0, self.typical.to(logits)
        least = torch.minimum(logits.abs(), KEPT * torch.where(present, typical[:, 1], typical[:, 0]).abs())
        return torch.where(present, moved.clamp(min=least), moved.clamp(max=-least))

    def told(self, follow: Tensor) -> str:
        """A line about what followed: names, and in how many targets."""
        count = Counter({name: n for name, n in zip(self.names, follow.sum(0).tolist(), strict=True) if n})
        return ", ".join(f"{name} ({n})" for name, n in count.most_common())
