"""Attributes set by name, ``--set NAME=VALUE``, and those that cannot stay as they were beside them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import InputError, nearest

CONTRADICTION = 0.4  # chosen on drawn faces of seed 26, see docs/guidance.md
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

    With `contradictions` of labels, the other attributes follow. A state, present or absent, that is seen less than
    ``contradiction`` times as often beside an edit contradicts it: the attribute's logit is brought to the typical one
    of the other state, or stays beyond it. So a hat takes away bangs that it would cover, and a target stays one that a
    face can have.

    Attributes:
        logits: attribute's index -> its logit.
        names: of all attributes, (d,).
        typical: each attribute's typical logits, (d, 2), without and with it.
        seldom: `contradictions`. contradiction: see above; 0: nothing follows.
    """

    logits: dict[int, float]
    names: Sequence[str]
    typical: Tensor | None
    seldom: Contradictions
    contradiction: float

    @classmethod
    def parse(
        cls, assignments: Sequence[str], names: Sequence[str], notes: Mapping, contradiction: float = CONTRADICTION
    ) -> "Edits":
        """Of ``NAME=VALUE`` strings.

        Args:
            notes: of the SPNN's config.json: ``typical_logits`` and ``contradictions``, if it has them.

        Raises:
            InputError: an attribute that does not exist (with the nearest match), or a value that is no number.
        """
        typical = notes.get("typical_logits")
        typical = None if typical is None else torch.tensor(typical)
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
        return cls(logits, names, typical, notes.get("contradictions", {}), contradiction)

    def apply(self, logits: Tensor, judged: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Edited targets (N, d), what the judge should see of them (N, d), and whose state followed, (N, d) bool."""
        if not self.logits:  # measurements of any shape may come
            return logits, judged, torch.zeros_like(logits, dtype=torch.bool)
        before, logits = logits, logits.clone()
        index = {name: i for i, name in enumerate(self.names)}
        for edited, logit in self.logits.items():
            for state, times in self.seldom.get(f"{self.names[edited]}={int(logit > 0)}", {}).items():
                name, _, value = state.rpartition("=")
                if times < self.contradiction and self.typical is not None:
                    bound = self.typical[index[name], 1 - int(value)].item()
                    logits[:, index[name]].clamp_(**({"max": bound} if value == "1" else {"min": bound}))
        for edited, logit in self.logits.items():
            logits[:, edited] = logit
        followed = (logits > 0) != (before > 0)
        followed[:, list(self.logits)] = False
        if judged is not None:
            judged = torch.where(followed, logits, judged)
            judged[:, list(self.logits)] = logits[:, list(self.logits)]
        return logits, judged, followed

    def told(self, follow: Tensor) -> str:
        """A line about what followed: names, and in how many targets."""
        count = Counter({name: n for name, n in zip(self.names, follow.sum(0).tolist(), strict=True) if n})
        return ", ".join(f"{name} ({n})" for name, n in count.most_common())
