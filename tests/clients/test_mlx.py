"""mlx-lm loads an export on MLX's CPU build and answers as transformers does with the artifact's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import quick_plan
from exporting import MIX
from upstream import decompressed, reference

from l4pack.checkpoint.open import open_source
from l4pack.export.mlx import Mlx
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.quantize.run import run_plan

mx = pytest.importorskip("mlx.core", reason="make test-clients installs MLX")
utils = pytest.importorskip("mlx_lm.utils", reason="make test-clients installs mlx-lm")

TOKENS = [256, *np.random.default_rng(7).integers(0, 256, 95).tolist()]
EPSILON = {"rms_norm_eps": 1e-6}  # mlx-lm has this one for queries and keys, whatever the model says
MOST_KL = 1e-6  # of arithmetic in float32; 6e-13 measured


@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
def test_it_answers_as_the_artifact(checkpoint, tmp_path, kind):
    source = checkpoint(kind, **EPSILON)
    artifact = run_plan(quick_plan(source, MIX), tmp_path / "artifact").out
    result = run_export(plan_export(open_source(str(artifact)), Mlx()), tmp_path / "out")
    assert result.proof.by.startswith("mlx 0.")
    model, _ = utils.load_model(result.out)
    model.set_dtype(mx.float32)  # its products with experts take no other on a CPU
    theirs = torch.from_numpy(np.array(model(mx.array([TOKENS]))[0])).double().log_softmax(-1)
    with torch.no_grad():
        logits = reference(source, kind, decompressed(artifact, exact=True))(input_ids=torch.tensor([TOKENS])).logits[0]
    ours = logits.double().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert 0 <= kl < MOST_KL
