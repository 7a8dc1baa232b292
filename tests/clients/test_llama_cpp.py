"""llama.cpp loads an export and answers as transformers does with the artifact's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import quick_plan
from exporting import MIX, with_merge
from upstream import decompressed, reference

from l4pack.checkpoint.open import open_source
from l4pack.export.gguf import Gguf
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.quantize.run import run_plan

pytest.importorskip("xllamacpp", reason="make test-clients installs llama.cpp")
from llama_cpp import LlamaCpp, float32_twin

# As the released models have them: what is another chunk's or temperature's, llama.cpp computes otherwise.
AS_RELEASED = {"attention_chunk_size": 8192, "floor_scale": 8192}
KINDS = {"scout": {}, "maverick": {"num_local_experts": 128, "intermediate_size": 64}, "text": {}}
TOKENS = [256, *np.random.default_rng(7).integers(0, 256, 63).tolist()]
POSITIONS = (1, 2, 7, 24, 40, 63)
# Of values: llama.cpp's float32 against transformers' (2e-7 measured). Of files: it rounds the inputs of products with
# quantized weights to eight bits, and which expert a token goes to may change with that (0.007 measured).
VALUES_KL, FILE_KL = 1e-5, 2e-2


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp("clients")
            source = with_merge(checkpoint(kind, **AS_RELEASED, **KINDS[kind]), place / "source")
            artifact = run_plan(quick_plan(source, MIX), place / kind).out
            out = run_export(plan_export(open_source(str(artifact)), Gguf()), place / "out").out
            model = reference(source, kind, decompressed(artifact, exact=True))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
            made[kind] = next(out.glob("[!m]*.gguf")), logits.double().log_softmax(-1).numpy()
        return made[kind]

    return make


def divergence(file, wanted):
    """Mean KL of some positions, transformers' answers first."""
    client = LlamaCpp(file, wanted.shape[1])
    found = []
    for position in POSITIONS:
        theirs = client.next_token(TOKENS[:position])
        ours = wanted[position - 1]
        found.append(float((np.exp(ours) * (ours - theirs)).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize("kind", KINDS)
def test_its_values_are_the_artifacts(exported, tmp_path, kind):
    file, wanted = exported(kind)
    assert abs(divergence(float32_twin(file, tmp_path / "twin.gguf"), wanted)) < VALUES_KL


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_from_the_file_itself(exported, kind):
    file, wanted = exported(kind)
    assert abs(divergence(file, wanted)) < FILE_KL


def test_it_loads_the_vision_tower(exported):
    file, wanted = exported("scout")
    tower = next(file.parent.glob("mmproj*.gguf"))
    LlamaCpp(file, wanted.shape[1], tower=tower)
    with pytest.raises(RuntimeError):
        LlamaCpp(file, wanted.shape[1], tower=file)
