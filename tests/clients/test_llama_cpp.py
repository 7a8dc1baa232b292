"""llama.cpp loads an export and answers as l4pack's own evaluation does with the artifact."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import quick_plan
from exporting import MIX, WIDE, carried, recipe_of, with_merge
from mixes import rounding
from streamed import (
    continuation,
    demo_tokens,
    divergence,
    exact_log_probabilities,
    log_probabilities,
    perplexity,
)

from l4pack.checkpoint.open import open_source
from l4pack.export.gguf import Gguf
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan

pytest.importorskip("xllamacpp", reason="make test-clients installs llama.cpp")
from llama_cpp import LlamaCpp, float32_twin

# As the released models have them: what is another chunk's or temperature's, llama.cpp computes otherwise.
AS_RELEASED = {"attention_chunk_size": 8192, "floor_scale": 8192}
KINDS = {"scout": {}, "maverick": {"num_local_experts": 128, "intermediate_size": 64}, "text": {}}
MIXES = {
    "scout": MIX,
    "maverick": MIX,
    "text": recipe_of(routed_expert="mxfp4", shared_expert="mxfp4", attention="int8-channel"),
    "demo": recipe_of(routed_expert="int4-g32", shared_expert="int8-g64"),
    "demo, mixed": recipe_of(routed_expert="q4_k", shared_expert="mxfp4", attention="int8-channel"),
}
DEMOS = ("demo", "demo, mixed")
TOKENS = [256, *np.random.default_rng(7).integers(0, 256, 63).tolist()]
POSITIONS = (1, 2, 7, 24, 40, 63)
HELD_OUT, PROMPT, GREEDY = 96, 24, 8  # of the demo; its first chunk, which llama.cpp computes as it does, has 127
# Of values: llama.cpp's float32 against transformers' (2e-7 measured), and against l4pack's, which rounds products of codes
# and scales to bfloat16 as vLLM does (3e-5 measured where weights are random, 2e-6 of the demo). Of files: llama.cpp rounds
# the inputs of products with quantized weights to eight bits, and which expert a token goes to may change with that (0.007
# measured, 1e-4 of the demo).
VALUES_KL, EVALUATED_KL, FILE_KL, FILE_PERPLEXITY = 1e-5, 3e-4, 2e-2, 0.005


@pytest.fixture(scope="module")
def artifacts(checkpoint, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp("clients")
            if kind in DEMOS:
                source, plan = None, make_plan(open_source("demo"), MIXES[kind])
            else:
                source = with_merge(checkpoint(kind, **AS_RELEASED, **KINDS[kind]), place / "source")
                plan = quick_plan(source, MIXES[kind])
            made[kind] = source, run_plan(plan, place / kind).out
        return made[kind]

    return make


@pytest.fixture(scope="module")
def exported(artifacts, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("gguf") / "out"
            artifact = artifacts(kind)[1]
            run_export(plan_export(open_source(str(artifact)), Gguf()), out)
            tokens = demo_tokens(HELD_OUT) if kind in DEMOS else TOKENS
            wanted = log_probabilities(artifact, tokens, out.parent / "work")
            made[kind] = next(out.glob("[!m]*.gguf")), tokens, wanted
        return made[kind]

    return make


def answers(file, tokens, vocabulary):
    """llama.cpp's log-probabilities after some of the tokens."""
    client = LlamaCpp(file, vocabulary)
    return np.stack([client.next_token(tokens[:position]) for position in POSITIONS])


def difference(wanted, theirs):
    """Mean KL of these positions, as it lies about zero."""
    return abs(divergence(wanted[[position - 1 for position in POSITIONS]], theirs))


@pytest.mark.parametrize("kind", [*KINDS, *DEMOS])
def test_its_values_are_the_artifacts(exported, artifacts, tmp_path, kind):
    file, tokens, wanted = exported(kind)
    theirs = answers(float32_twin(file, tmp_path / "twin.gguf"), tokens, wanted.shape[1])
    print(f"{kind}: values, KL {difference(wanted, theirs):.1e} to l4pack's evaluation")
    assert difference(wanted, theirs) < EVALUATED_KL
    source, artifact = artifacts(kind)
    if source is not None:
        exact = difference(exact_log_probabilities(source, kind, artifact, tokens), theirs)
        print(f"{kind}: values, KL {exact:.1e} to transformers")
        assert exact < VALUES_KL


@pytest.mark.parametrize("name", carried("gguf"))
def test_every_shipped_recipe_that_is_carried_has_the_artifacts_values(checkpoint, tmp_path, name):
    """Dense layers and experts in turn; how levels were chosen is nothing to the container."""
    source = with_merge(checkpoint("maverick", use_qk_norm=True, **AS_RELEASED, **WIDE), tmp_path / "source")
    artifact = run_plan(quick_plan(source, rounding(name)), tmp_path / "artifact").out
    run_export(plan_export(open_source(str(artifact)), Gguf()), tmp_path / "out")
    wanted = log_probabilities(artifact, TOKENS, tmp_path / "work")
    twin = float32_twin(next((tmp_path / "out").glob("[!m]*.gguf")), tmp_path / "twin.gguf")
    theirs = answers(twin, TOKENS, wanted.shape[1])
    assert difference(wanted, theirs) < EVALUATED_KL


@pytest.mark.parametrize("kind", [*KINDS, *DEMOS])
def test_it_answers_from_the_file_itself(exported, kind):
    file, tokens, wanted = exported(kind)
    found = difference(wanted, answers(file, tokens, wanted.shape[1]))
    print(f"{kind}: file, KL {found:.1e} to l4pack's evaluation")
    assert found < FILE_KL


def test_it_loads_embeddings_of_eight_bits(exported, artifacts, tmp_path):
    _, tokens, wanted = exported("demo")
    run_export(plan_export(open_source(str(artifacts("demo")[1])), Gguf(), round_embeddings=True), tmp_path / "out")
    found = difference(wanted, answers(next((tmp_path / "out").glob("[!m]*.gguf")), tokens, wanted.shape[1]))
    print(f"demo, embeddings of eight bits: file, KL {found:.1e} to l4pack's evaluation of the artifact")
    assert found < FILE_KL


def test_text_that_was_held_out_is_as_likely_and_goes_on_alike(exported, artifacts):
    file, tokens, wanted = exported("demo")
    client = LlamaCpp(file, wanted.shape[1])
    theirs = np.stack([client.next_token(tokens[: end + 1]) for end in range(len(tokens) - 1)])
    ours, found = perplexity(wanted, tokens), perplexity(theirs, tokens)
    print(f"demo: perplexity {ours:.4f}, llama.cpp {found:.4f}, KL {divergence(wanted[:-1], theirs):.1e}")
    assert found == pytest.approx(ours, rel=FILE_PERPLEXITY)
    said = list(tokens[:PROMPT])
    while len(said) < PROMPT + GREEDY:
        said.append(int(client.next_token(said).argmax()))
    assert said[PROMPT:] == continuation(artifacts("demo")[1], tokens[:PROMPT], GREEDY)


def test_it_loads_the_vision_tower(exported):
    file, _, wanted = exported("scout")
    tower = next(file.parent.glob("mmproj*.gguf"))
    # A server that ends before it has begun to serve may wait for itself: one that is asked something has begun.
    assert np.isfinite(LlamaCpp(file, wanted.shape[1], tower=tower).next_token("the")).all()
    with pytest.raises(RuntimeError):
        LlamaCpp(file, wanted.shape[1], tower=file)
