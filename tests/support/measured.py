"""An evaluation as `accuracy.json` holds it, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l4pack.artifact.contents import recorded_digest


def record(folder: Path, **changes: Any) -> dict[str, Any]:
    """A valid record of the weights in `folder`; a change to None takes a key out."""
    identity = {"artifact": recorded_digest(folder), "--weights-only": False, "tokens": "b" * 64}
    text = {"source": "held-out.txt", "sha256": "a" * 64, "tokens_sha256": "b" * 64, "sequences": 2, "tokens": 4096,
            "sequence_length": 2048, "seed": 0}  # fmt: skip
    run = {"device": "cpu", "dtype": "float32", "activations": "rounded", "seconds": 1.0, "peak_rss_bytes": 1,
           "versions": {"torch": "2"}}  # fmt: skip
    whole = {
        "schema_version": 2, "identity": identity, "artifact": folder.name, "against": "original",
        "artifact_weight_bytes": 1, "against_weight_bytes": 4, "tokens": 4096, "text": text, "tasks": {}, "layers": [],
        "worst": [], "run": run, "gates": [], "kl_mean": 0.02, "kl_standard_error": 0.001, "kl_median": 0.01,
        "kl_p99": 0.1, "kl_p999": 0.2, "kl_max": 0.3, "kl_histogram": {"edges": [0.1], "counts": [4000, 96]},
        "by_position": [], "top1_agreement": 0.95, "top1_agreement_standard_error": 0.01,
        "perplexity_reference": 10.0, "perplexity_reference_standard_error": 0.1, "perplexity_artifact": 10.4,
        "perplexity_artifact_standard_error": 0.1, "perplexity_ratio": 1.04, "perplexity_ratio_standard_error": 0.01,
        **changes,
    }  # fmt: skip
    return {key: value for key, value in whole.items() if value is not None}


def measured(folder: Path, **changes: Any) -> dict[str, Any]:
    """Put such a record into a folder."""
    made = record(folder, **changes)
    (folder / "accuracy.json").write_text(json.dumps(made))
    return made
