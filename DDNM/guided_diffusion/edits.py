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


def effects_of_states(logits: Tensor) -> Tensor:
    """How g's logits differ beside an attribute that g sees, the others being equal: (d, d), [attribute][logit].

    The linear regression of logits on their signs, with a ridge of one image.

    Args:
        logits: of many images, (N, d).
    """
    y = logits.double()
    states = torch.cat([(y > 0).double(), torch.ones(len(y), 1, dtype=y.dtype)], 1)  # (N, d + 1)
    gram = states.T @ states + torch.eye(states.shape[1], dtype=y.dtype)
    return torch.linalg.solve(gram, states.T @ y)[:-1].to(logits.dtype)


@dataclass(frozen=True)
class Edits:
    """Logits that targets are given, whatever the image's own are.

    The others follow, so that a target stays one that a face can have:

    - A state, present or absent, that the labels have less than ``contradiction`` times as often beside an edit (see
      `contradictions`) contradicts it: the attribute's logit is brought to the typical one of the other state, or stays
      beyond it. So a hat takes away bangs that it would cover.
    - Then every attribute that keeps its state moves by the ``effects`` of the states that change: g says other things
      of hair beside a hat than without one. No logit crosses 0; it stops at `KEPT` of its typical one, or where it was
      if that is nearer to 0.

    Attributes:
        logits: attribute's index -> its logit.
        names: of all attributes, (d,).
        typical: each attribute's typical logits, (d, 2), without and with it.
        seldom: `contradictions`. effects: see `effects_of_states`. Without one of them nothing follows in its way.
        contradiction: see above; 0: nothing follows at all.
    """

    logits: dict[int, float]
    names: Sequence[str]
    typical: Tensor | None
    seldom: Contradictions
    effects: Tensor | None
    contradiction: float

    @classmethod
    def parse(
        cls, assignments: Sequence[str], names: Sequence[str], notes: Mapping, contradiction: float = CONTRADICTION
    ) -> "Edits":
        """Of ``NAME=VALUE`` strings.

        Args:
            notes: of the SPNN's config.json: ``typical_logits``, ``contradictions`` and ``effects``, if it has them.

        Raises:
            InputError: an attribute that does not exist (with the nearest match), or a value that is no number.
        """
        typical = notes.get("typical_logits")
        typical = None if typical is None else torch.tensor(typical)
        effects = None if typical is None else notes.get("effects")
        effects = None if effects is None else torch.tensor(effects)
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
        return cls(logits, names, typical, notes.get("contradictions", {}), effects, contradiction)

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
        if self.effects is not None and self.contradiction > 0:
            given = followed.clone()
            given[:, edited] = True
            change = (logits > 0).to(logits) - (before > 0).to(logits)  # (N, d): -1, 0, 1
            logits = torch.where(given, logits, self._beside(logits, change @ self.effects.to(logits)))
        if judged is not None:
            judged = torch.where(followed, logits, judged)
            judged[:, edited] = logits[:, edited]
        return logits, judged, followed

    def _beside(self, logits: Tensor, move: Tensor) -> Tensor:
        """Logits (N, d), moved as far as their states allow; see the class."""
        assert self.typical is not None
        present, typical, moved = logits > 0, self.typical.to(logits), logits + move
        least = torch.minimum(logits.abs(), KEPT * torch.where(present, typical[:, 1], typical[:, 0]).abs())
        return torch.where(present, moved.clamp(min=least), moved.clamp(max=-least))

    def told(self, follow: Tensor) -> str:
        """A line about what followed: names, and in how many targets."""
        count = Counter({name: n for name, n in zip(self.names, follow.sum(0).tolist(), strict=True) if n})
        return ", ".join(f"{name} ({n})" for name, n in count.most_common())
