"""Run by the interpreter of .venv-vllm: many checks in one process, because importing vLLM takes most of the time.

Reads one JSON object from stdin, `{"command_line": [...], "checks": [{artifact, against, exact}], "specs_of": folder}`,
and prints one. The command line is that of tools/vllm/vllm_load.py.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "vllm"))

from vllm_kv_blocks import Setting, _vllm_config, layer_specs
from vllm_load import check
from vllm_load import main as vllm_load


def specs_agree(folder: Path) -> bool:
    """Whether the planner tool's cache specifications are those of vLLM's real layers."""
    from vllm.model_executor.model_loader.utils import initialize_model

    setting = Setting(folder, 512, "bfloat16", 1, 512, async_scheduling=True, block_size=16, kv_memory=None)
    config = _vllm_config(setting, hybrid=True)
    initialize_model(config, model_config=config.model_config)
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    declared = {
        name: layer.get_kv_cache_spec(config) for name, layer in layers.items() if name.endswith("self_attn.attn")
    }
    expected = layer_specs(config, setting)
    text_only = {name: spec for name, spec in declared.items() if "vision" not in name}
    return {name: repr(spec) for name, spec in text_only.items()} == {n: repr(s) for n, s in expected.items()}


def main() -> None:
    jobs = json.load(sys.stdin)
    sys.argv[1:] = jobs["command_line"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = vllm_load()  # also makes this process able to build models
    reports = [
        check(Path(job["artifact"]), Path(job["against"]) if job["against"] else None, job["exact"])
        for job in jobs["checks"]
    ]
    answer = {"reports": reports, "specs_agree": specs_agree(Path(jobs["specs_of"]))}
    print(json.dumps(answer | {"printed": printed.getvalue(), "status": status}))


if __name__ == "__main__":
    main()
