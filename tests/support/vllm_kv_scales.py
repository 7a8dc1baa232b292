"""Run by the interpreter of .venv-vllm: the KV-cache scales vLLM holds after its own loader and its own post-processing.

Reads a JSON list of artifact folders from stdin; prints, for each, what was found wrong, whether `--kv-cache-dtype auto`
is FP8, and by layer the scales of keys and values before and after `process_weights_after_loading`.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "vllm"))

from vllm_load import start
from vllm_load_model import load


def scales(folder: Path) -> dict[str, Any]:
    loaded = load(folder)
    layers = {}
    assert loaded.model is not None, loaded.findings
    for name, module in loaded.model.named_modules():
        if name.endswith("self_attn.attn") and hasattr(module, "k_scale"):
            before = {one: getattr(module, one).float().tolist() for one in ("k_scale", "v_scale")}
            module.quant_method.process_weights_after_loading(module)
            after = {one: getattr(module, f"_{one}").float().reshape(-1).tolist() for one in before}
            layers[name] = {"before": before, "after": after, "dtype": module.kv_cache_dtype}
    return {"findings": [str(finding) for finding in loaded.findings], "kv_scales": loaded.kv_scales, "layers": layers}


if __name__ == "__main__":
    folders = json.load(sys.stdin)
    start()
    print(json.dumps([scales(Path(folder)) for folder in folders]))
