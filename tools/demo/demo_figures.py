"""The demo model's figures: bits per byte of held-out text, and what plain int4 rounding does to it.

    python tools/demo/demo_figures.py [MODEL] [--text FILE] [--card]

The forward is transformers' own, in float32. `--card` writes the figures into the model's README.md.
"""

import argparse
import gzip
import lzma
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

WINDOW = 512
GROUP, LARGEST = 128, 7.5
DEMO = Path(__file__).parents[2] / "l4pack" / "demo"


@dataclass(frozen=True)
class Figures:
    """`kl_error` is the standard error over windows; `experts` the share of tokens of each expert, per layer."""

    bytes: int
    tokens: int
    bits_per_byte: float
    gzip: float
    xz: float
    perplexity: float
    perplexity_rounded: float
    kl: float
    kl_error: float
    top1_agreement: float
    experts: list[list[float]]


def load(folder: Path) -> Llama4ForConditionalGeneration:
    """The model in float32. Raises SystemExit when a tensor is missing or unexpected."""
    model, report = Llama4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(report.values()):
        raise SystemExit(f"{folder}: {report}")
    return model.eval()


def token_ids(folder: Path, text: str) -> list[int]:
    """Token ids of `text` as one document."""
    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def windows(ids: list[int], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [1, at most length]: every token but the first is a target exactly once."""
    row = torch.tensor(ids)[None]
    for start in range(0, len(ids) - 1, length):
        yield row[:, start:-1][:, :length], row[:, start + 1 :][:, :length]


@torch.no_grad()
def bits_per_byte(model: Llama4ForConditionalGeneration, folder: Path, text: str) -> float:
    """Bits a byte of `text`, in windows of WINDOW tokens."""
    nats = sum(
        functional.cross_entropy(_logits(model, inputs), targets[0], reduction="sum").item()
        for inputs, targets in windows(token_ids(folder, text), WINDOW)
    )
    return nats / math.log(2) / len(text.encode())


def _logits(model: Llama4ForConditionalGeneration, inputs: Tensor) -> Tensor:
    return model(input_ids=inputs, use_cache=False).logits[0]


def rounded_int4(weight: Tensor) -> Tensor:
    """`weight` [..., in] after symmetric int4 rounding with one scale, amax / 7.5, for GROUP inputs."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


@torch.no_grad()
def round_experts(model: Llama4ForConditionalGeneration) -> None:
    """Round every routed and shared expert matrix of `model` in place; fused tensors are in x out."""
    for name, parameter in model.language_model.named_parameters():
        if "feed_forward.experts." in name:
            parameter.copy_(rounded_int4(parameter.mT).mT)
        elif "feed_forward" in name and "router" not in name:
            parameter.copy_(rounded_int4(parameter))


@torch.no_grad()
def measure(folder: Path, text: str) -> Figures:
    """Every figure of the model in `folder` over `text`."""
    original, rounded = load(folder), load(folder)
    round_experts(rounded)
    counts = [_counted(module) for name, module in original.named_modules() if name.endswith("router")]
    ids, sums = token_ids(folder, text), []
    for inputs, targets in windows(ids, WINDOW):
        sums.append(_compared(_logits(original, inputs), _logits(rounded, inputs), targets[0]))
    return _figures(torch.tensor(sums, dtype=torch.float64), text, counts)


def _counted(router: torch.nn.Module) -> Tensor:
    """A running count of the tokens that `router` sends to each expert: its other scores are zero."""
    count = torch.zeros(router.num_experts)

    def add(_router: torch.nn.Module, _inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
        count.add_((outputs[0] > 0).sum(0))

    router.register_forward_hook(add)
    return count


def _compared(reference: Tensor, artifact: Tensor, targets: Tensor) -> list[float]:
    """Sums over one window: tokens, nats of both models, KL(reference || artifact), agreeing first choices."""
    before, after = reference.double().log_softmax(-1), artifact.double().log_softmax(-1)
    kl = functional.kl_div(after, before, reduction="sum", log_target=True).item()
    agree = (before.argmax(-1) == after.argmax(-1)).sum().item()
    nats = [functional.nll_loss(found, targets, reduction="sum").item() for found in (before, after)]
    return [float(len(targets)), *nats, kl, float(agree)]


def _figures(sums: Tensor, text: str, counts: list[Tensor]) -> Figures:
    tokens, nats, nats_rounded, kl, agree = sums.sum(0).tolist()
    data, means = text.encode(), sums[:, 3] / sums[:, 0]
    return Figures(
        bytes=len(data),
        tokens=int(tokens),
        bits_per_byte=nats / math.log(2) / len(data),
        gzip=8 * len(gzip.compress(data, 9)) / len(data),
        xz=8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        perplexity=math.exp(nats / tokens),
        perplexity_rounded=math.exp(nats_rounded / tokens),
        kl=kl / tokens,
        kl_error=(means.std() / math.sqrt(len(means))).item(),
        top1_agreement=agree / tokens,
        experts=[(count / count.sum()).tolist() for count in counts],
    )


def table(figures: Figures) -> str:
    """The figures as a Markdown table."""
    increase = figures.perplexity_rounded / figures.perplexity - 1
    shares = [share for layer in figures.experts for share in layer]
    rows = {
        "held-out text": f"{figures.bytes:,} bytes, {figures.tokens:,} tokens, windows of {WINDOW}",
        "bits per byte": f"{figures.bits_per_byte:.4f} (gzip -9: {figures.gzip:.3f}, xz -9e: {figures.xz:.3f})",
        "perplexity per token": f"{figures.perplexity:.3f}",
        "perplexity, experts rounded to int4": f"{figures.perplexity_rounded:.3f} ({increase:+.2%})",
        "KL(original ‖ rounded), nats per token": f"{figures.kl:.5f} ± {figures.kl_error:.5f}",
        "first choice agrees": f"{figures.top1_agreement:.2%}",
        "an expert's share of its layer's tokens": f"{min(shares):.1%} to {max(shares):.1%}",
    }
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write_card(folder: Path, figures: Figures) -> None:
    """Replace the table between the markers of README.md."""
    card = folder / "README.md"
    block = f"<!-- figures -->\n{table(figures)}\n<!-- /figures -->"
    old = card.read_text(encoding="utf-8")
    card.write_text(re.sub(r"<!-- figures -->.*<!-- /figures -->", lambda _: block, old, flags=re.S), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model.")
    parser.add_argument("model", type=Path, nargs="?", default=DEMO / "model")
    parser.add_argument("--text", type=Path, default=DEMO / "heldout.txt")
    parser.add_argument("--card", action="store_true", help="write the figures into the model's README.md")
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.text.read_text(encoding="utf-8"))
    print(table(figures))
    for layer, shares in enumerate(figures.experts):
        print(f"MoE layer {layer}:", " ".join(f"{share:.1%}" for share in shares))
    if arguments.card:
        write_card(arguments.model, figures)


if __name__ == "__main__":
    main()
