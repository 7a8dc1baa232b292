"""llm-compressor's half of `against_llmcompressor.py`: runs in an environment of its own, knows nothing of l4pack.

python llmcompressor_side.py MODEL TOKENS.json OUT DTYPE SCHEME    prints versions as JSON
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast

# The recipe of its examples/multimodal_vision/llama4_example.py.
IGNORE = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]

# Four-bit floats are rounded, as its examples/quantization_w4a4_fp4/llama4_example.py has it.
MODIFIERS = {"W4A16": GPTQModifier}


def main() -> None:
    source, tokens, out, dtype, scheme = sys.argv[1:]
    sequences = json.loads(Path(tokens).read_text())
    model = Llama4ForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype))
    processor = PreTrainedTokenizerFast.from_pretrained(source)
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=model,
        processor=processor,
        dataset=data,
        recipe=MODIFIERS.get(scheme, QuantizationModifier)(targets="Linear", scheme=scheme, ignore=IGNORE),
        max_seq_length=len(sequences[0]),
        num_calibration_samples=len(sequences),
        sequential_targets=["Llama4TextMLP"],
    )
    model.save_pretrained(out, save_compressed=True)
    processor.save_pretrained(out)
    names = ("llmcompressor", "torch", "transformers", "compressed-tensors")
    print("VERSIONS " + json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    main()
