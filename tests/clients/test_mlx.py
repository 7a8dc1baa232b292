"""mlx-lm loads an export on MLX's CPU build and answers as l4pack's own evaluation does with the artifact."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import quick_plan
from exporting import MIX, WIDE, carried, recipe_of
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
from l4pack.export.mlx import Mlx
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan

mx = pytest.importorskip("mlx.core", reason="make test-clients installs MLX")
utils = pytest.importorskip("mlx_lm.utils", reason="make test-clients installs mlx-lm")

TOKENS = [256, *np.random.default_rng(7).integers(0, 256, 95).tolist()]
EPSILON = {"rms_norm_eps": 1e-6}  # mlx-lm has this one for queries and keys, whatever the model says
MXFP4 = recipe_of(routed_expert="mxfp4", shared_expert="mxfp4", dense_mlp="mxfp4", attention="int8-g64")
CASES = [("scout", MIX, {}), ("maverick", MIX, {}), ("text", MIX, {}), ("maverick", MXFP4, {})]
CASES += [("maverick", rounding(name), WIDE) for name in carried("mlx")]
NAMES = ["scout", "maverick", "text", "maverick-all-mxfp4", *(f"maverick-{name}" for name in carried("mlx"))]
# Of arithmetic in float32 (6e-13 measured), and against l4pack's evaluation, which rounds products of codes and scales to
# bfloat16 as vLLM does: 4e-4 measured where weights are random, 2e-6 of the demo, whose epsilon is another, too.
EXACT_KL, EVALUATED_KL, DEMO_KL, DEMO_PERPLEXITY = 1e-6, 3e-3, 2e-5, 1e-3
ROUNDED_KL = 3e-2  # weights are random, and what is rounded may send a token to another expert
HELD_OUT, PROMPT, GREEDY = 256, 24, 16


def exported(artifact, out, **options):
    """mlx-lm's model of an artifact."""
    result = run_export(plan_export(open_source(str(artifact)), Mlx(), **options), out)
    assert result.proof.by.startswith("mlx 0.")
    model, _ = utils.load_model(result.out)
    model.set_dtype(mx.float32)  # its products with experts take no other on a CPU
    return model


def answers(model, tokens):
    """float64 [tokens, vocabulary] log-probabilities of the token after each."""
    logits = np.array(model(mx.array([tokens]))[0]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("kind", "recipe", "sizes"), CASES, ids=NAMES)
def test_it_answers_as_the_artifact(checkpoint, tmp_path, kind, recipe, sizes):
    """Every shipped recipe that MLX carries among them; how levels were chosen is nothing to the container."""
    source = checkpoint(kind, **EPSILON, **sizes)
    artifact = run_plan(quick_plan(source, recipe), tmp_path / "artifact").out
    theirs = answers(exported(artifact, tmp_path / "out"), TOKENS)
    exact = divergence(exact_log_probabilities(source, kind, artifact, TOKENS), theirs)
    evaluated = divergence(log_probabilities(artifact, TOKENS, tmp_path / "work"), theirs)
    print(f"{kind}: KL {exact:.1e} to transformers, {evaluated:.1e} to l4pack's evaluation")
    assert abs(exact) < EXACT_KL
    assert abs(evaluated) < EVALUATED_KL


def test_it_loads_embeddings_of_eight_bits(checkpoint, tmp_path):
    artifact = run_plan(quick_plan(checkpoint("scout", **EPSILON), MIX), tmp_path / "artifact").out
    theirs = answers(exported(artifact, tmp_path / "out", round_embeddings=True), TOKENS)
    found = divergence(log_probabilities(artifact, TOKENS, tmp_path / "work"), theirs)
    print(f"embeddings of eight bits: KL {found:.1e} to l4pack's evaluation of the artifact")
    assert abs(found) < ROUNDED_KL


def test_text_that_was_held_out_is_as_likely_and_goes_on_alike(tmp_path):
    recipe = recipe_of(routed_expert="int4-g32", shared_expert="int8-g64")
    artifact = run_plan(make_plan(open_source("demo"), recipe), tmp_path / "artifact").out
    model, tokens = exported(artifact, tmp_path / "out"), demo_tokens(HELD_OUT)
    ours, theirs = log_probabilities(artifact, tokens, tmp_path / "work"), answers(model, tokens)
    print(
        f"demo: KL {divergence(ours, theirs):.1e}, perplexity {perplexity(ours, tokens)}, {perplexity(theirs, tokens)}"
    )
    assert abs(divergence(ours, theirs)) < DEMO_KL
    assert perplexity(theirs, tokens) == pytest.approx(perplexity(ours, tokens), rel=DEMO_PERPLEXITY)
    said = list(tokens[:PROMPT])
    while len(said) < PROMPT + GREEDY:
        said.append(int(answers(model, said)[-1].argmax()))
    assert said[PROMPT:] == continuation(artifact, tokens[:PROMPT], GREEDY)
