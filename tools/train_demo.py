"""Train the demo model: a small Llama 4 on the documentation and source that every CPython carries.

    python tools/train_demo.py --out DIR [--preset scout|maverick] [--steps N]

DIR becomes a checkpoint laid out as the BF16 Llama 4 repositories are, with `heldout.txt` and `calibration.txt` beside it.
It needs no network. A CPU with BF16 matrix instructions takes about a second a step; glibc's allocator gives memory back
and faults it in again at every step unless MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 is set.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import Corpus, load_corpus
from demo_data import LENGTH, Windows, begin_id, streams
from demo_export import write_checkpoint
from demo_figures import bits_per_byte, load, windows
from demo_model import Params, Preset, Routing, TextModel, initial, preset
from demo_optimizer import Optimizer
from demo_tokenizer import train_tokenizer, write_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

SEQUENCES, MICRO_BATCH = 16, 8
WARMUP, CONSTANT = 0.03, 0.4
BALANCE = 0.01
REPORT_EVERY, SAVE_EVERY = 50, 200


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    tokenizer = train_tokenizer(_tokenizer_texts(corpus))
    _write_texts(corpus, arguments.out.parent)
    write_tokenizer(tokenizer, arguments.out)
    sizes = preset(arguments.preset, tokenizer.get_vocab_size())
    params = train(sizes, corpus, tokenizer, arguments)
    write_checkpoint(sizes, params, tokenizer, arguments.out, arguments.seed)
    _compare_with_upstream(sizes, params, tokenizer, corpus.heldout, arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder; texts go beside it")
    parser.add_argument("--preset", choices=("scout", "maverick"), default="scout")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=20250405)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _tokenizer_texts(corpus: Corpus) -> list[str]:
    """Prose counts three times: the tokenizer should fit what the model is measured on."""
    prose = [document.text for document in corpus.documents if document.kind != "source"]
    return [*prose * 3, *(document.text for document in corpus.documents if document.kind == "source")]


def _write_texts(corpus: Corpus, folder: Path) -> None:
    (folder / "heldout.txt").write_text(corpus.heldout, encoding="utf-8")
    (folder / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")


def train(sizes: Preset, corpus: Corpus, tokenizer: Tokenizer, arguments: argparse.Namespace) -> Params:
    """Float32 weights after `arguments.steps` steps of SEQUENCES windows each."""
    params = initial(sizes, torch.Generator().manual_seed(arguments.seed))
    model, optimizer = TextModel(sizes, params, torch.bfloat16), Optimizer(params)
    data = Windows(streams(corpus, tokenizer), begin_id(tokenizer), arguments.seed)
    heldout = tokenizer.encode(corpus.heldout).ids
    print(f"{sum(value.numel() for value in params.values()):,} parameters", {k: len(v) for k, v in data.rows.items()})
    started, losses = time.monotonic(), []
    for step in range(1, arguments.steps + 1):
        loss, routing = _accumulate(model, data)
        optimizer.step(_schedule(step / arguments.steps))
        losses.append(loss)
        if step % REPORT_EVERY == 0 or step in (1, 10):
            share = "/".join(f"{int(c.min())}-{int(c.max())}" for c in routing.counts)
            print(
                f"{step} {time.monotonic() - started:.0f}s loss {sum(losses) / len(losses):.4f} tokens {share}", end=""
            )
            print(f" heldout {own_bits_per_byte(model, heldout, corpus.heldout):.4f} bpb", flush=True)
            losses.clear()
        if step % SAVE_EVERY == 0:
            save_file({name: value.detach() for name, value in params.items()}, arguments.out.parent / "training.st")
    return params


def _accumulate(model: TextModel, data: Windows) -> tuple[float, Routing]:
    """Gradients of one step's windows; the mean loss in nats a token and the last routing."""
    total = 0.0
    for _ in range(SEQUENCES // MICRO_BATCH):
        batch = data.batch(MICRO_BATCH)
        logits, routing = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        ((loss + BALANCE * routing.balance) * (MICRO_BATCH / SEQUENCES)).backward()
        total += loss.item() * MICRO_BATCH / SEQUENCES
    return total, routing


def _schedule(progress: float) -> float:
    """Warm up, hold, and go linearly to zero."""
    if progress < WARMUP:
        return progress / WARMUP
    return 1.0 if progress < CONSTANT else (1.0 - progress) / (1.0 - CONSTANT)


@torch.no_grad()
def own_bits_per_byte(model: TextModel, ids: list[int], text: str) -> float:
    """Bits a byte of `text` by the training forward, in windows of LENGTH."""
    nats = sum(_nats(model, inputs, targets) for inputs, targets in windows(ids, LENGTH))
    return nats / math.log(2) / len(text.encode())


def _nats(model: TextModel, inputs: Tensor, targets: Tensor) -> float:
    """The last window is shorter; padding it behind changes nothing before."""
    chunk = model.sizes.attention_chunk_size
    padded = F.pad(inputs, (0, -inputs.shape[1] % chunk))
    logits = model(padded)[0][:, : inputs.shape[1]]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()


def _compare_with_upstream(sizes: Preset, params: Params, tokenizer: Tokenizer, text: str, folder: Path) -> None:
    rounded = {name: value.detach().bfloat16().float() for name, value in params.items()}
    own = own_bits_per_byte(TextModel(sizes, rounded), tokenizer.encode(text).ids, text)
    print(
        f"BF16 weights, float32 forward: own {own:.6f}, transformers {bits_per_byte(load(folder), folder, text):.6f} bpb"
    )


if __name__ == "__main__":
    main()
