"""Train the demo model: a small Llama 4 on the documentation and source that every CPython carries.

    python tools/demo/train_demo.py --out DIR [--preset scout|maverick] [--steps N] [--minutes M]
    python tools/demo/train_demo.py --out DIR --text perl --layers 8 --experts 8   # another text, another shape

DIR becomes a checkpoint laid out as the BF16 Llama 4 repositories are; `heldout.txt` and `calibration.txt` go beside it.
It needs no network. The ranks are processes of one thread each that meet once a step: on a shared machine, threads that
meet at every matrix product wait for the slowest one every time. glibc's allocator faults memory in again at every step
unless MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 is set.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from demo_corpus import Corpus, divide, load_corpus
from demo_data import LENGTH, Windows, begin_id, streams
from demo_export import write_checkpoint
from demo_figures import bits_per_byte, load, windows
from demo_model import Params, Preset, Routing, TextModel, initial, preset
from demo_optimizer import Optimizer
from demo_perl import perl_chats, perl_documents
from demo_tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

SEQUENCES = 8
WARMUP, CONSTANT = 0.03, 0.35
BALANCE = 0.01
REPORT_EVERY, MEASURE_EVERY = 25, 150


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    meeting = arguments.out.parent.resolve() / f"ranks-{time.time_ns()}"
    multiprocessing.spawn(_rank, (arguments, meeting), nprocs=arguments.ranks)
    meeting.unlink(missing_ok=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder; texts go beside it")
    parser.add_argument("--preset", choices=("scout", "maverick"), default="scout")
    parser.add_argument("--layers", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--experts", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--text", choices=("python", "perl"), default="python", help="what it is trained on")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="shorten the schedule to end by then")
    parser.add_argument("--seed", type=int, default=20250405)
    parser.add_argument("--ranks", type=int, default=2, help=f"processes; a divisor of {SEQUENCES}")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of matrix products; float32 is faster where the processor has no BF16 ones",
    )
    return parser.parse_args()


def _rank(rank: int, arguments: argparse.Namespace, meeting: Path) -> None:
    """One process: all train, the first one reports and writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=arguments.ranks)
    corpus = load_corpus() if arguments.text == "python" else divide(list(perl_documents()), perl_chats)
    tokenizer = train_tokenizer(_tokenizer_texts(corpus))
    sizes = _sizes(arguments, tokenizer.get_vocab_size())
    params = train(sizes, corpus, tokenizer, arguments)
    distributed.destroy_process_group()
    if rank == 0:
        _write_texts(corpus, arguments.out.parent)
        write_tokenizer(tokenizer, arguments.out)
        write_checkpoint(sizes, params, tokenizer, arguments.out, arguments.seed)
        _compare_with_upstream(sizes, params, tokenizer, corpus.heldout, arguments.out)


def _sizes(arguments: argparse.Namespace, vocabulary: int) -> Preset:
    found = preset(arguments.preset, vocabulary)
    layers = arguments.layers or found.num_hidden_layers
    return replace(found, num_hidden_layers=layers, num_local_experts=arguments.experts or found.num_local_experts)


def _tokenizer_texts(corpus: Corpus) -> list[str]:
    """Prose counts three times: the tokenizer should fit what the model is measured on."""
    prose = [document.text for document in corpus.documents if document.kind != "source"]
    return [*prose * 3, *(document.text for document in corpus.documents if document.kind == "source")]


def _write_texts(corpus: Corpus, folder: Path) -> None:
    (folder / "heldout.txt").write_text(corpus.heldout, encoding="utf-8")
    (folder / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")


def train(sizes: Preset, corpus: Corpus, tokenizer: Tokenizer, arguments: argparse.Namespace) -> Params:
    """Float32 weights after the whole schedule, the same in every rank."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    compute = getattr(torch, arguments.dtype)
    params = initial(sizes, torch.Generator().manual_seed(arguments.seed))
    model, optimizer = TextModel(sizes, params, compute), Optimizer(params, compute)
    data = Windows(streams(corpus, tokenizer), begin_id(tokenizer), arguments.seed + rank)
    report = _Report(model, tokenizer, corpus.heldout) if rank == 0 else None
    clock, step, progress = _Clock(arguments.minutes), 0, 0.0
    while progress < 1.0:
        step += 1
        progress = max(step / arguments.steps, clock.progress())
        loss, routing = _gradients(model, data.batch(SEQUENCES // ranks), ranks)
        optimizer.step(_schedule(progress))
        if report:
            report.add(step, loss, routing)
    return params


class _Clock:
    """How much of the time is over, as the first rank sees it."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.started = time.monotonic()

    def progress(self) -> float:
        over = torch.tensor((time.monotonic() - self.started) / self.seconds)
        distributed.broadcast(over, 0)
        return over.item()


class _Report:
    """Prints the training loss, the smallest and largest load of an expert, and now and then the held-out loss."""

    def __init__(self, model: TextModel, tokenizer: Tokenizer, text: str) -> None:
        self.model, self.text = model, text
        self.ids = tokenizer.encode(text).ids
        self.started, self.losses = time.monotonic(), list[float]()
        print(f"{sum(value.numel() for value in model.params.values()):,} parameters of the text model", flush=True)

    def add(self, step: int, loss: float, routing: Routing) -> None:
        self.losses.append(loss)
        if step % REPORT_EVERY == 0:
            loads = " ".join(f"{int(c.min())}-{int(c.max())}" for c in routing.counts)
            mean = sum(self.losses) / len(self.losses)
            print(f"step {step} {time.monotonic() - self.started:.0f} s loss {mean:.4f} loads {loads}", flush=True)
            self.losses.clear()
        if step % MEASURE_EVERY == 0:
            print(f"held-out {own_bits_per_byte(self.model, self.ids, self.text):.4f} bits per byte", flush=True)


def _gradients(model: TextModel, batch: Tensor, ranks: int) -> tuple[float, Routing]:
    """Leave this rank's share of the mean gradient; its mean loss in nats a token and its routing."""
    logits, routing = model(batch[:, :-1])
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    ((loss + BALANCE * routing.balance) / ranks).backward()
    return loss.item(), routing


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
    padded = functional.pad(inputs, (0, -inputs.shape[1] % chunk))
    logits = model(padded)[0][:, : inputs.shape[1]]
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()


def _compare_with_upstream(sizes: Preset, params: Params, tokenizer: Tokenizer, text: str, folder: Path) -> None:
    rounded = {name: value.detach().bfloat16().float() for name, value in params.items()}
    own = own_bits_per_byte(TextModel(sizes, rounded), tokenizer.encode(text).ids, text)
    print(
        f"BF16 weights, float32 forward: own {own:.6f}, transformers {bits_per_byte(load(folder), folder, text):.6f} bpb"
    )


if __name__ == "__main__":
    main()
