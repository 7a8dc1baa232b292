"""Whether an artifact and an original may be compared at all."""

from __future__ import annotations

from typing import Any

import torch

from l4pack.artifact.original import ORIGINAL_KEYS, manifest_of, original_record, weights_digest
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.reference import StoredReference
from l4pack.stream.units import layer_units, module_names
from l4pack.stream.weights import Weights
from l4pack.text.sequences import TokenText
from l4pack.text.tokenizer import load_tokenizer

_SHOWN = "num_hidden_layers", "hidden_size", "num_local_experts", "vocab_size"


def check_same_model(artifact: Checkpoint, original: Checkpoint) -> None:
    """Raise UsageError naming the first field of the text configuration that differs."""
    ours, theirs = _compared(artifact), _compared(original)
    differing = [key for key in (*_SHOWN, *ours) if ours[key] != theirs.get(key)]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{artifact.name} is an artifact of another model: {key} is {ours[key]}, {original.name} has {theirs[key]}",
            hint="give the checkpoint it was quantized from with --against",
        )


def _compared(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of the text configuration; which layers are which as sets, since tools list what the original leaves to
    its defaults."""
    text = checkpoint.config.text
    fields = text.model_dump(exclude={"moe_layers_listed", "no_rope_layers_listed"})
    return fields | {"moe_layers": sorted(text.moe_layers), "rope_layers": sorted(text.rope_layers)}


def check_reference(artifact: Checkpoint, original: Checkpoint | None, stored: StoredReference) -> None:
    """Raise UsageError when kept answers are not of the original that the artifact's manifest names.

    A reference knows its original by headers and by its norms and routers, which the artifact holds too.
    """
    if stored.vocabulary != artifact.config.text.vocab_size:
        raise UsageError(
            f"{stored.folder} was kept of a model with {stored.vocabulary} tokens, {artifact.name} has "
            f"{artifact.config.text.vocab_size}",
            hint="give the answers of the original this artifact was made from",
        )
    known = {key: stored.record.get(key) for key in ORIGINAL_KEYS}
    if original is not None and known != original_record(original):
        raise UsageError(f"{stored.folder} was not kept of {original.name}", hint="leave one of the two out")
    manifest = manifest_of(artifact)
    if manifest is None:
        return
    source = manifest.source
    if None in known.values():
        what = "does not say which original it was kept of"
    elif known["headers_sha256"] != source.headers_sha256:
        what = f"was kept of another model than {source.repository or source.name}"
    elif known["weights_sha256"] != weights_digest(artifact):
        what = f"was kept of a model like {source.repository or source.name} with other weights"
    else:
        return
    raise UsageError(
        f"{stored.folder} {what}", hint="keep the original's answers again: --against SOURCE --save-reference"
    )


def check_not_dequantized(artifact: Weights, original: Weights) -> None:
    """Raise UsageError when the original's numbers are the artifact's own: what was rounded to integers and back.

    Headers and kept tensors of such a checkpoint are those of the original. The first matrix with integer weights that
    is not all zeros tells; FP8 is not asked, because a model published in FP8 comes out of it as it went in.
    """
    config = artifact.checkpoint.config
    units = (unit for layer in range(config.text.num_hidden_layers) for unit in layer_units(config, layer))
    for module in (name for unit in units for name in module_names(config, unit).values()):
        if not artifact.is_quantized(module):
            continue
        mine, theirs = (weights.linears([module])[module] for weights in (artifact, original))
        if mine.activations is not None:
            return
        if mine.weight.any():
            if torch.equal(mine.weight, theirs.weight):
                raise UsageError(
                    f"{original.checkpoint.name} holds the rounded numbers of {artifact.checkpoint.name} ({module}): it "
                    "was dequantized, and is not the original",
                    hint="give the checkpoint it was quantized from",
                )
            return


def check_same_tokens(artifact: Checkpoint, original: Checkpoint, text: TokenText, tokenizer: object) -> None:
    """Raise UsageError when the artifact's tokenizer reads the text differently, SourceError when it has none."""
    if artifact.store is None or original.store is None or _same_file(artifact, original):
        return
    own = load_tokenizer(artifact)
    known = getattr(tokenizer, "decode")  # noqa: B009
    for sequence in text.sequences:
        if own.decode(sequence.tokens) != known(sequence.tokens):
            raise UsageError(
                "the tokenizers of artifact and original differ: the same tokens stand for different text",
                hint="copy the original's tokenizer files into the artifact",
            )


def _same_file(artifact: Checkpoint, original: Checkpoint) -> bool:
    assert artifact.store is not None
    assert original.store is not None
    if "tokenizer.json" not in artifact.companions or "tokenizer.json" not in original.companions:
        return False
    paths = artifact.store.path("tokenizer.json"), original.store.path("tokenizer.json")
    return paths[0].read_bytes() == paths[1].read_bytes()
