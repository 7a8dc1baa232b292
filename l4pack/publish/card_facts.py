"""All that a model card is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l4pack.artifact.policy import Policy
from l4pack.recipe import Recipe


@dataclass(frozen=True)
class DeviceFit:
    """The largest contexts that fit on a host, with a BF16 and with an FP8 KV cache; 0 when the weights don't.

    `gpus` is what one copy takes of the host's; None when they can't share the model.
    """

    device: str
    gpus: int | None
    max_context: int
    max_context_fp8: int


@dataclass(frozen=True)
class Rung:
    """Another artifact of the same model: its size, its most careful evaluation, and where it runs, in words."""

    name: str
    repository: str | None  # where it is on the Hub, where its card says so
    weight_bytes: int
    accuracy: Mapping[str, Any] | None
    runs: str


@dataclass(frozen=True)
class ExportFacts:
    """What is said of an export: an artifact's numbers in the files of another runtime.

    `rounded` has the matrices that the files don't hold exactly: where, their type there, and why. `memory` has the most tokens
    of one sequence by device.
    """

    container: str
    artifact: str
    proved_by: str
    model: str  # the file, or the first of its parts, that llama.cpp is given; empty for a folder
    tower: str | None
    context: int
    text_alone: bool = False  # whether a vision tower was left out
    rounded: Sequence[tuple[str, str, str]] = ()
    memory: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class CardFacts:
    """All a card is made from."""

    name: str
    policy: Policy
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Mapping[str, int]
    base_model: str | None = None
    languages: Sequence[str] = ()
    accuracy: Mapping[str, Any] | None = None  # the most careful evaluation
    others: Sequence[Mapping[str, Any]] = ()  # all other evaluations
    claim: str = ""  # how sure the base model is, in words; nothing to say where the source was read from there
    weight_bytes: int | None = None  # of all tensors
    calibration: Mapping[str, Any] | None = None
    fits: Sequence[DeviceFit] = field(default_factory=list)
    gated: bool = False
    served: Mapping[str, str] = field(default_factory=dict)  # by runtime, the command that was budgeted for
    serves: str = ""  # what those commands were budgeted for, in words
    exported_for: tuple[str, str] | None = None  # the runtime and its container, where none loads the artifact as it is
    repository: str | None = None  # where it is, or is about to be, on the Hub
    generation: Mapping[str, Any] = field(default_factory=dict)  # the source's own sampling
    chat: bool = False  # whether there is a template for conversations
    family: Sequence[Rung] = ()  # other artifacts of the same model
    packaged: str = ""  # the day, as 2026-11-26
    export: ExportFacts | None = None  # None for an artifact itself

    @property
    def recipe(self) -> Recipe:
        """The recipe the artifact was made with."""
        return Recipe.model_validate(self.manifest["recipe"])

    @property
    def multimodal(self) -> bool:
        """Whether the model sees images."""
        return self.config.get("vision_config") is not None
