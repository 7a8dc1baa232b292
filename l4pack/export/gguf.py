"""GGUF as a target: llama.cpp's types and names, with the gguf library to write headers and to read all of it back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize
from numpy.typing import NDArray

from l4pack import __version__
from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import SourceRecord, read_manifest
from l4pack.checkpoint.shards import FilePlace
from l4pack.checkpoint.source import LocalStore
from l4pack.containers.gguf import (
    ARCHITECTURE,
    WIDE,
    lay_out,
    rope_factors_name,
    text_name,
)
from l4pack.containers.gguf_text import as_run, check_text, context_length, describe_text, rope_factors
from l4pack.containers.gguf_tokenizer import describe_tokenizer, has_tokenizer
from l4pack.containers.gguf_vision import ARCHITECTURE as VISION_ARCHITECTURE
from l4pack.containers.gguf_vision import FAULT, describe_vision, is_wide, vision_name
from l4pack.errors import L4packError
from l4pack.export.artifact import Artifact, Source
from l4pack.export.reread import same_codes
from l4pack.export.target import TOWER, Carried, Layout, OutTensor
from l4pack.formats.carrier import Carrier, SolvedRows
from l4pack.formats.ggml import ROUNDED_TO, carrier_of
from l4pack.model.config import Llama4Config
from l4pack.model.parts import WEIGHT
from l4pack.model.tensors import Role
from l4pack.publish.licence import folder_materials, governing_policy
from l4pack.quant.floats import Float32Array
from l4pack.quant.scheme import Scheme

_FILE_TYPES = {"Q4_0": LlamaFileType.MOSTLY_Q4_0, "Q4_1": LlamaFileType.MOSTLY_Q4_1, "Q8_0": LlamaFileType.MOSTLY_Q8_0,
               "MXFP4": LlamaFileType.MOSTLY_MXFP4_MOE, "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
               "BF16": LlamaFileType.MOSTLY_BF16, "F16": LlamaFileType.MOSTLY_F16,
               "F32": LlamaFileType.ALL_F32}  # fmt: skip
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


class Gguf:
    """See `Target`."""

    name = "gguf"
    clients = "llama.cpp, Ollama, LM Studio"
    rounded_to = ROUNDED_TO
    alignment = GGUF_DEFAULT_ALIGNMENT

    def check_model(self, config: Llama4Config) -> None:
        """See `Target`."""
        check_text(config)

    def as_run(self, config: Llama4Config) -> Llama4Config:
        """See `Target`."""
        return as_run(config)

    def check(self, artifact: Artifact) -> list[str]:
        """See `Target`."""
        found, context = [], context_length(artifact.config)
        positions = artifact.config.text.max_position_embeddings
        if context < positions:
            found.append(
                f"the file says a context of {context:,} tokens, not {positions:,}: beyond it llama.cpp, which has its own "
                "chunks and temperatures of attention, would answer otherwise"
            )
        if not has_tokenizer(_folder(artifact)):
            found.append("there is no tokenizer that merges bytes: the file takes token ids, not text")
        if artifact.config.vision is not None:
            found.append(FAULT)
        return found

    def carrier(self, scheme: Scheme, columns: int, dtype: str) -> Carrier | str:
        """See `Target`."""
        del dtype  # a block's scale is F16, whatever it was
        return carrier_of(scheme, columns)

    def holds(self, role: Role) -> bool:
        """See `Target`."""
        del role
        return True

    def carries(self, file: str) -> bool:
        """See `Target`: the tokenizer lies in the file."""
        del file
        return False

    def tensor_name(self, artifact: Artifact, source: str, role: Role, layer: int | None, suffix: str) -> str:
        """See `Target`."""
        del suffix
        if role in TOWER:
            return vision_name(source, artifact.layout.naming)
        return text_name(role, source.removesuffix(f".{WEIGHT}").rpartition(".")[2], layer)

    def float_type(self, artifact: Artifact, role: Role, source: Source, shape: tuple[int, ...]) -> str:
        """See `Target`."""
        tower = role in TOWER and is_wide(source.name, artifact.layout.naming, len(shape))
        return "F32" if role in WIDE or tower else source.dtype

    def constants(self, artifact: Artifact) -> list[Carried]:
        """See `Target`."""
        factors = rope_factors(artifact.config)
        if factors is None:
            return []
        tensor = OutTensor(rope_factors_name(), "F32", factors.shape, factors.nbytes, factors.nbytes)
        return [Carried(Role.NORM, (), (tensor,), constant=factors)]

    def lay_out(self, artifact: Artifact, carried: Sequence[Carried], limit: int | None) -> Layout:
        """See `Target`."""
        text = [tensor for one in carried if one.role not in TOWER for tensor in one.tensors]
        tower = [tensor for one in carried if one.role in TOWER for tensor in one.tensors]
        config, folder = artifact.config, _folder(artifact)

        def describe(writer: GGUFWriter) -> None:
            _describe(writer, artifact, "model", _most(text))
            describe_text(writer, config)
            describe_tokenizer(writer, folder, config.text.vocab_size)

        def describe_tower(writer: GGUFWriter) -> None:
            _describe(writer, artifact, "mmproj", _most(tower))
            describe_vision(writer, config, folder)

        stem = _UNFIT.sub("-", _name(artifact))
        shards, places = lay_out(text, f"{stem}-{_most(text)}", ARCHITECTURE, limit or 0, describe)
        if tower:
            of_tower = lay_out(tower, f"mmproj-{stem}-{_most(tower)}", VISION_ARCHITECTURE, 0, describe_tower)
            shards, places = [*shards, *of_tower[0]], {**places, **of_tower[1]}
        return Layout(tuple(shards), places)

    @property
    def proved_by(self) -> str:
        """See `Target`."""
        return f"gguf {version('gguf')}"

    def opened(self, folder: Path, layout: Layout) -> Mapping[str, FilePlace]:
        """See `Target`."""
        found: dict[str, FilePlace] = {}
        for shard in layout.shards:
            for tensor in GGUFReader(folder / shard.file).tensors:
                found[tensor.name] = FilePlace(shard.file, tensor.data_offset, int(tensor.n_bytes))
        if found != dict(layout.places):
            raise L4packError("gguf finds other tensors in the file than were written", hint="add --restart")
        return found

    def same_codes(self, carried: Carried, rows: Sequence[NDArray[np.uint8]], solved: SolvedRows) -> bool | None:
        """See `Target`."""
        return None if carried.carrier is None else same_codes(carried.carrier, rows[0], solved)

    def decode(self, carried: Carried, rows: Sequence[NDArray[np.uint8]]) -> Float32Array:
        """See `Target`."""
        values: Float32Array = dequantize(rows[0], GGMLQuantizationType[carried.tensors[0].dtype])
        return values


def _folder(artifact: Artifact) -> Path:
    store = artifact.checkpoint.store
    assert isinstance(store, LocalStore)
    return store.folder


def _source(artifact: Artifact) -> SourceRecord | None:
    """What the artifact was made from, where its manifest says that."""
    folder = _folder(artifact)
    return read_manifest(folder).source if (folder / MANIFEST_NAME).is_file() else None


def _most(tensors: Sequence[OutTensor]) -> str:
    """The type that most weights have: what the file is called by."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.dtype] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _name(artifact: Artifact) -> str:
    """The name of what the artifact was made from, else its folder's."""
    source = _source(artifact)
    return source.name if source is not None else _folder(artifact).absolute().name


def _describe(writer: GGUFWriter, artifact: Artifact, what: str, kind: str) -> None:
    """What the file is, what it was made from and by, and under which licence it may be handed on."""
    source = _source(artifact)
    writer.add_type(what)
    writer.add_name(_name(artifact))
    writer.add_file_type(_FILE_TYPES[kind])
    terms = governing_policy(folder_materials(_folder(artifact))).metadata
    writer.add_license(terms["license"])
    writer.add_license_name(terms.get("license_name", ""))  # what is empty is not written
    writer.add_license_link(terms.get("license_link", ""))
    writer.add_quantized_by(f"l4pack {__version__}")
    digest = recorded_digest(_folder(artifact))
    if digest is not None:
        writer.add_string("l4pack.artifact_sha256", digest)
    if source is None:
        return
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, source.name)
    if source.repository is not None:
        writer.add_base_model_organization(0, source.repository.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{source.repository}")
    if source.revision is not None:
        writer.add_base_model_version(0, source.revision)
