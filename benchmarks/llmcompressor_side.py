"""llm-compressor's half of `against_llmcompressor.py`: runs in an environment of its own, knows nothing of l4pack.

python llmcompressor_side.py MODEL TOKENS.json OUT    prints one JSON object: seconds and peak memory
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast

IGNORE = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]


def main() -> None:
    source, tokens, out = sys.argv[1:]
    sequences = json.loads(Path(tokens).read_text())
    started = time.monotonic()
    # float32: bfloat16 products take hundreds of times longer on a CPU without AMX.
    model = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast.from_pretrained(source),
        dataset=data,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=IGNORE),
        max_seq_length=len(sequences[0]),
        num_calibration_samples=len(sequences),
        sequential_targets=["Llama4TextMLP"],
    )
    model.save_pretrained(out, save_compressed=True)
    record = {
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers", "compressed-tensors")},
    }
    print("RESULT " + json.dumps(record))


if __name__ == "__main__":
    main()
