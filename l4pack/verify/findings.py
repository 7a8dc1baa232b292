"""What a check found: one finding is one rule broken at one place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Level = Literal["error", "warning"]


class Area(StrEnum):
    """What a rule is about; the report counts findings by area."""

    FILES = "files"
    CONFIGURATION = "configuration"
    TENSORS = "tensors"
    IGNORE = "ignore list and targets"
    VALUES = "values"
    DIGESTS = "digests"
    KEPT = "kept, as the source"
    WEIGHTS = "weights, as the source"


RULES: dict[str, tuple[Area, str]] = {
    "shard": (Area.FILES, "a weight file is damaged, missing or not listed"),
    "index": (Area.FILES, "the index disagrees with the weight files"),
    "companion": (Area.FILES, "a file that runtimes need is missing or altered"),
    "strange": (Area.FILES, "a file that does not belong in an artifact"),
    "tokenizer": (Area.FILES, "token ids beyond the embedding"),
    "config": (Area.CONFIGURATION, "config.json lost or changed something"),
    "stanza": (Area.CONFIGURATION, "quantization_config is wrong"),
    "scheme": (Area.CONFIGURATION, "a scheme that can't be verified, so nothing is known of its weights"),
    "runtime": (Area.CONFIGURATION, "a runtime that does not read this rightly"),
    "naming": (Area.TENSORS, "prefixes no runtime expects"),
    "missing": (Area.TENSORS, "tensors missing"),
    "unexpected": (Area.TENSORS, "tensors no runtime expects"),
    "fused": (Area.TENSORS, "experts fused in 3-D tensors"),
    "dtype": (Area.TENSORS, "wrong dtype"),
    "shape": (Area.TENSORS, "wrong shape"),
    "ignore": (Area.IGNORE, "the file and the stanza disagree about what is quantized"),
    "mixed": (Area.IGNORE, "matrices that vLLM fuses differ in scheme"),
    "scale": (Area.VALUES, "scales that can't be right"),
    "packing": (Area.VALUES, "bits set where none belong"),
    "weight_shape": (Area.VALUES, "weight_shape is not the matrix's shape"),
    "not-finite": (Area.VALUES, "NaN or infinite values"),
    "dead": (Area.VALUES, "nothing but zeros"),
    "duplicate": (Area.VALUES, "two experts of a layer with the same bytes"),
    "kv-scale": (Area.VALUES, "KV-cache scales that can't be right"),
    "manifest": (Area.DIGESTS, "the manifest is not whole, or its recipe is not this artifact's"),
    "digest": (Area.DIGESTS, "something is not what the manifest says"),
    "signature": (Area.DIGESTS, "the files are not what somebody who may sign has signed"),
    "source": (Area.KEPT, "the source is not what the artifact was made from"),
    "kept": (Area.KEPT, "a tensor that was to be kept differs from the source"),
    "weights": (Area.WEIGHTS, "dequantized weights too far from the source"),
}
"""Every rule: its area, and what a finding of it means."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule broken at one place: a file, a tensor, a module or a key of config.json."""

    rule: str
    where: str
    message: str
    level: Level = "error"

    def __post_init__(self) -> None:
        assert self.rule in RULES

    @property
    def area(self) -> Area:
        """What the rule is about."""
        return RULES[self.rule][0]


class Findings:
    """Findings in the order they were made."""

    def __init__(self) -> None:
        self._found: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def error(self, rule: str, where: str, message: str) -> None:
        """Something is wrong."""
        self._found.append(Finding(rule, where, message))

    def warning(self, rule: str, where: str, message: str) -> None:
        """Something to know, that fails nothing by itself."""
        self._found.append(Finding(rule, where, message, "warning"))

    def lead(self, rule: str, where: str, message: str, instead_of: Collection[str] = ()) -> None:
        """The cause of all else, told first; findings of rules `instead_of` go."""
        rest = [finding for finding in self._found if finding.rule not in instead_of]
        self._found = [Finding(rule, where, message), *rest]

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add findings made elsewhere."""
        self._found.extend(findings)
