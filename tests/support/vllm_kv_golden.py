"""Make tests/golden/vllm-kv-0.33.0.json: what vLLM's own KV cache planner says of a table of settings.

    tools/vllm/make_vllm_venv.sh
    .venv-vllm/bin/python tests/support/vllm_kv_golden.py

Needs no GPU and no weights. tests/budget/test_budget_kv.py holds l4pack's arithmetic against the file, to the block.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "vllm"))

from vllm_environment import VLLM_VERSION, prepare  # noqa: E402

OUT = ROOT / "tests" / "golden" / f"vllm-kv-{VLLM_VERSION}.json"
CONTEXTS = (1, 16, 17, 8192, 24_576, 24_577, 131_072, 430_000, 1_048_576, 10_485_760)
KV_MEMORY = 8_000_000_000
PATTERNS = {  # which layers have RoPE and chunks: groups of unlike sizes, in every case of vLLM's rule
    "llama-4": [1, 1, 1, 0] * 12,
    "nearly equal": [1, 0] * 5 + [1, 1],
    "uneven": [1, 1, 1, 1, 0] * 3 + [0, 0],
    "all full": [0] * 6,
    "all chunked": [1] * 6,
}


def cases() -> list[dict[str, object]]:
    """Settings: the released pattern over contexts, dtypes, TP and batch; the others at one context."""
    dtypes = ("bfloat16", "fp8")
    found = [
        {"pattern": "llama-4", "context": context, "kv_dtype": dtype, "tp": tp, "batched_tokens": 8192}
        for context, dtype, tp in itertools.product(CONTEXTS, dtypes, (1, 8))
    ]
    found += [
        {"pattern": "llama-4", "context": 131_072, "kv_dtype": "bfloat16", "tp": tp, "batched_tokens": batch}
        for tp, batch in itertools.product((2, 4), (2048, 16_384))
    ]
    return found + [
        {"pattern": pattern, "context": 100_000, "kv_dtype": "bfloat16", "tp": 1, "batched_tokens": 8192}
        for pattern in PATTERNS
    ]


def main() -> None:
    """Ask the planner about every case and write the file."""
    prepare()
    from vllm_kv_blocks import Setting, report

    config = json.loads((ROOT / "l4pack" / "model" / "configs" / "llama-4-scout.json").read_text())
    records = []
    for case in cases():
        flags = PATTERNS[str(case["pattern"])]
        config["text_config"] |= {"no_rope_layers": flags, "num_hidden_layers": len(flags)}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            asked = Setting(
                Path(folder), case["context"], case["kv_dtype"], case["tp"], case["batched_tokens"], True, 16, KV_MEMORY
            )
            answer = report(asked)
        kept = ("request_bytes", "bytes_per_block", "request_blocks", "max_context", "num_blocks")
        records.append(
            case
            | {"no_rope_layers": flags}
            | {key: {name: answer[key][name] for name in kept} for key in ("hybrid_on", "hybrid_off")}
        )
    lines = ",\n".join(json.dumps(record) for record in records)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(f'{{"vllm": "{VLLM_VERSION}", "kv_memory": {KV_MEMORY}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
