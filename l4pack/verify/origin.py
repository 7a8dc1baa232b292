"""What an artifact was made from, and whether that is the source it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l4pack import __version__
from l4pack.artifact.adapters import other_adapters
from l4pack.artifact.manifest import source_record
from l4pack.artifact.manifest_schema import ManifestFile
from l4pack.checkpoint.sample import local_sample
from l4pack.checkpoint.source import Checkpoint
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Linear
from l4pack.recipe import RecipeScheme
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact
from l4pack.verify.tally import Tally

_SIZES = {
    "num_hidden_layers": "layers", "num_local_experts": "experts", "hidden_size": "hidden size",
    "intermediate_size": "expert width", "intermediate_size_mlp": "dense width", "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads", "vocab_size": "tokens",
}  # fmt: skip
# A fine-tune may leave norms, embeddings and attention alone, damage does not change a quarter of what was copied.
_MATRICES, _KEPT = 0.5, 0.25
_OF_SOURCE = ("weights", "kept", "dead", "config", "companion", "strange", "duplicate")


class OriginCheck:
    """Tells, first and once, that the source is another model; the hundred differences are then only a consequence."""

    def __init__(self, artifact: OpenedArtifact, manifest: ManifestFile | None, source: Checkpoint) -> None:
        self._artifact, self._manifest, self._source = artifact, manifest, source
        self._same_tensors = (
            manifest is None or manifest.source.headers_sha256 == source_record(source)["headers_sha256"]
        )
        known = manifest.source.sample_sha256 if manifest is not None and self._same_tensors else None
        self._unlike = manifest if manifest is None else other_adapters("the artifact", manifest.source, source)
        self._same_weights = known is None or local_sample(source) in (None, known)
        self.comparable = source_linears(source, artifact.layout.linears) is not None
        """Whether the models have the same matrices."""

    def tell(self, tally: Tally, found: Findings) -> None:
        """Say what the source is, now that it was compared: the same model, or another."""
        if not self.comparable:
            message = f"it is a model of another shape ({self._sizes()}): nothing was compared"
            found.lead("source", self._source.name, f"{self._made_from()}; {message}")
            return
        matrices = sum(finding.rule in ("weights", "dead") for finding in found if finding.level == "error")
        kept = sum(finding.rule == "kept" for finding in found)
        if self._unlike is not None:
            found.lead("source", self._source.name, ": ".join(self._unlike), instead_of=_OF_SOURCE)
        elif matrices > _MATRICES * tally.matrices_compared and kept > _KEPT * tally.kept_compared:
            message = (
                f"{self._made_from()}; it has other weights, so it is another model or a fine-tune: {matrices} of "
                f"{tally.matrices_compared} quantized matrices and {kept} of {tally.kept_compared} kept tensors differ"
            )
            found.lead("source", self._source.name, message, instead_of=_OF_SOURCE)
        elif not self._same_weights:
            message = "its tensors have the same names and shapes, its weights are not those that were read then"
            found.lead("source", self._source.name, f"{self._made_from()}; {message}")
        elif not self._same_tensors:
            found.warning("source", self._source.name, f"{self._made_from()}; its tensors have other names or shapes")

    def _made_from(self) -> str:
        record = self._manifest.source if self._manifest else None
        name = f"made from {record.repository or record.name}" if record else "made from a model it does not name"
        return f"{name}, compared with {self._source.name}"

    def _sizes(self) -> str:
        mine, theirs = self._artifact.config.text, self._source.config.text
        pairs = [(title, getattr(mine, key), getattr(theirs, key)) for key, title in _SIZES.items()]
        return ", ".join(f"{title} {new} and {old}" for title, new, old in pairs if new != old) or "other layers"


@dataclass(frozen=True)
class Made:
    """How a matrix was made; `exact` if this version of l4pack made it, and so would make the same bytes again."""

    scheme: RecipeScheme
    exact: bool


def made_by(manifest: ManifestFile | None, config: Llama4Config) -> Callable[[Linear], Made | None]:
    """How the manifest's recipe says that a matrix was made; None where it says nothing."""
    if manifest is None:
        return lambda _: None
    recipe, exact = manifest.made_with(), manifest.l4pack_version == __version__

    def made(linear: Linear) -> Made | None:
        number = recipe.rule_for(linear.role, linear.layer, config.text.num_hidden_layers)
        scheme = None if number is None else recipe.schemes.get(recipe.rules[number].scheme)
        return None if scheme is None else Made(scheme, exact)

    return made


def source_linears(source: Checkpoint, runtime: tuple[Linear, ...]) -> Mapping[str, Linear] | None:
    """Where the source has each of the artifact's matrices, by module; None when the models differ in shape."""
    old = source.layout.linears
    if len(old) != len(runtime):
        return None
    pairs = list(zip(old, runtime, strict=True))
    if any((a.out_features, a.in_features) != (b.out_features, b.in_features) for a, b in pairs):
        return None
    return {b.module: a for a, b in pairs}
