"""auto-round's part of `accuracy.py`: runs in an environment of its own, knows nothing of l4pack.

python autoround_side.py MODEL TOKENS.json OUT SCHEME ITERATIONS    prints versions as JSON

Attention, router, vision and head are left as they are, as llm-compressor's Llama 4 example has it, so that both quantize the
same matrices to as many bits.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import Llama4ForConditionalGeneration, PreTrainedTokenizerFast

IGNORED = "self_attn,router,lm_head,vision_model,multi_modal_projector"


def main() -> None:
    source, tokens, out, scheme, iterations = sys.argv[1:]
    sequences = json.loads(Path(tokens).read_text())
    model = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    rounding = AutoRound(
        model,
        tokenizer,
        processor=tokenizer,  # it wants one for multimodal models; nothing but text passes here
        scheme=scheme,
        iters=int(iterations),
        dataset=[torch.tensor([ids]) for ids in sequences],
        nsamples=len(sequences),
        seqlen=len(sequences[0]),
        ignore_layers=IGNORED,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(out, format="llm_compressor")
    [made] = Path(out).glob("*/config.json")  # a folder named after the scheme
    for file in made.parent.iterdir():
        shutil.move(file, Path(out, file.name))
    made.parent.rmdir()
    names = ("auto-round", "torch", "transformers")
    print("VERSIONS " + json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    main()
