"""Which files of a source a walk reads when: what a source that is fetched meanwhile must have there, and for how long.

Step 0 reads the embeddings, step n + 1 layer n. A file stays from the first step that reads it to the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from l4pack.checkpoint.source import Checkpoint
from l4pack.model.tensors import Role

_NOT_WALKED = (Role.VISION, Role.PROJECTOR, Role.LM_HEAD)


@dataclass(frozen=True)
class Itinerary:
    """The files each step reads."""

    steps: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Itinerary:
        """The walk over a checkpoint whose text has no images."""
        steps: list[set[str]] = [set() for _ in range(checkpoint.config.text.num_hidden_layers + 1)]
        for spec in checkpoint.layout.tensors:
            if spec.role is Role.EMBEDDING:
                steps[0].update(checkpoint.entries[spec.name].stored)
            elif spec.layer is not None and spec.role not in _NOT_WALKED:
                steps[spec.layer + 1].update(checkpoint.entries[spec.name].stored)
        return cls(tuple(map(frozenset, steps)))

    def arriving(self, step: int, start: int = 0) -> frozenset[str]:
        """Files first read at a step by a walk that begins with `start`; none past the last step."""
        if step >= len(self.steps):
            return frozenset()
        return self.steps[step].difference(*self.steps[start:step])

    def leaving(self, step: int) -> frozenset[str]:
        """Files read at a step and not after it."""
        return self.steps[step].difference(*self.steps[step + 1 :])

    def walked(self, start: int = 0) -> frozenset[str]:
        """Files that a walk beginning with `start` reads."""
        return frozenset().union(*self.steps[start:])

    def peak_bytes(self, sizes: Mapping[str, int]) -> int:
        """Most bytes of files at once: those of a step or between two steps that read them, and the next one's."""
        here: set[str] = set()
        peak = 0
        for step in range(len(self.steps)):
            here |= self.arriving(step)
            peak = max(peak, sum(sizes[file] for file in here | self.arriving(step + 1)))
            here -= self.leaving(step)
        return peak


def file_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Weight bytes of every file."""
    sizes: dict[str, int] = defaultdict(int)
    for entry in checkpoint.entries.values():
        for file, nbytes in entry.stored.items():
            sizes[file] += nbytes
    return sizes
