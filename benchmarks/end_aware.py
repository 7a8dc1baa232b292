"""Whether rounding with the model's end in mind buys anything beyond today's solver, by KL on held-out text.

    python benchmarks/end_aware.py SOURCE CALIBRATION HELDOUT [--only METHOD ...] [--samples 96] [--seeds 0 1]

The model runs whole, in transformers' float32 forward with torch's autograd; MLPs are solved layer by layer as `int4-uniform`
does, for the inputs that the layers solved before make, aiming at the original's. All methods write the same bytes. Ratios
are to `today` on the same held-out tokens, with standard errors by bootstrap over sequences; calibration is drawn anew by
each seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer
from two_sided import Inputs, Solved, Task, best_of_folds, best_of_orders, best_of_scales, today, two_sided
from whole_model import BATCH, Fisher, Key, Mlp, Model, divergence, fisher_of, own_samples, with_routers

from l4pack.calibration.carried import Ends
from l4pack.calibration.rows import Block as UnitBlock
from l4pack.calibration.rows import UnitRows, expert_rows
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.recipe import load_recipe
from l4pack.stream.layer import Routing


@dataclass(frozen=True)
class Method:
    """How matrices are rounded.

    `outputs` is whose gradients H_O is made of: the matrix' `own`, or those of its `layer`'s output, carried back through
    the MLP. In place of the latter: of the `last` layer's, those of the `vocabulary`'s logits all alike, or `local`, all
    outputs of the layer alike.
    """

    outputs: str = ""
    source: str = "samples"
    nested: bool = False
    dampening: float = 0.05
    shrink: int = 0  # rows that the layer's H_O counts as, beside the matrix' own
    groups: int = 0
    folds: tuple[float, ...] = ()
    orders: int = 1
    scales: tuple[float, ...] = ()
    sweeps: int = 4


FOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.85, 0.9, 0.95, 1.05, 1.1)
METHODS = {
    "today": Method(),
    "own, sweeps": Method("own"),
    "own, nested": Method("own", nested=True),
    "own, nested, damped 0.2": Method("own", nested=True, dampening=0.2),
    "own, nested, damped 1": Method("own", nested=True, dampening=1.0),
    "own, nested, shrunk": Method("own", nested=True, shrink=1024),
    "layer, sweeps": Method("layer"),
    "layer, nested": Method("layer", nested=True),
    "layer, nested, damped 0.2": Method("layer", nested=True, dampening=0.2),
    "layer, nested, 1 sweep": Method("layer", nested=True, sweeps=1),
    "layer, nested alone": Method("layer", nested=True, sweeps=0),
    "last, nested": Method("last", nested=True),
    "vocabulary, nested": Method("vocabulary", nested=True),
    "local, sweeps": Method("local"),
    "local, nested": Method("local", nested=True),
    "own, nested, KL": Method("own", nested=True, source="divergence"),
    "layer, nested, routers": Method("layer", nested=True, source="samples and routers"),
    "layer, nested, KL": Method("layer", nested=True, source="divergence"),
    "tokens weighted": Method(groups=1),
    "tokens weighted, 4 groups": Method(groups=4),
    "folded": Method(folds=FOLDS),
    "best of 4 orders": Method(orders=4),
    "best of 6 scales": Method(scales=SCALES),
    "16 sweeps": Method(sweeps=16),
    "folded, own, nested": Method("own", nested=True, folds=FOLDS),
    "folded, layer, nested": Method("layer", nested=True, folds=FOLDS),
}
GROUPS = 4


@dataclass(frozen=True)
class Original:
    """The original model on the calibration text: each layer's inputs to its MLPs, and what backward passes gave."""

    ids: Tensor
    rows: list[Tensor]
    fishers: Mapping[str, Fisher]


@torch.no_grad()
def rows_of(model: Model, ids: Tensor) -> list[Tensor]:
    """What the MLPs of every layer see [tokens, hidden]."""
    hidden, found = model.embed(ids), []
    for index in range(len(model.layers)):
        after, rows = model.attend(index, hidden)
        found.append(rows)
        hidden = model.through(index, after, rows)
    return found


@dataclass(frozen=True)
class Block:
    """A unit's inputs [n, hidden] in both streams, their weights, whose original is another's, and their tokens."""

    inputs: Tensor
    original: Tensor
    weight: Tensor
    kept: Tensor | None
    tokens: Tensor


class Solver:
    """Rounds all MLPs of a model by one method."""

    def __init__(self, model: Model, original: Original, method: Method) -> None:
        recipe = load_recipe("int4-uniform")
        assert recipe.calibration is not None
        self.scheme, self.min_tokens = recipe.schemes["int4"], recipe.calibration.min_tokens
        assert self.scheme.gptq is not None
        self.options = self.scheme.gptq.model_copy(update={"sweeps": method.sweeps})
        self.model, self.original, self.method = model, original, method
        self.fisher = original.fishers[method.source]

    @torch.no_grad()
    def solve(self) -> None:
        """Layer by layer, for the inputs that solved layers make; the model is left rounded."""
        hidden = self.model.embed(self.original.ids)
        for index, layer in enumerate(self.model.layers):
            after, rows = self.model.attend(index, hidden)
            units = layer.feed_forward.units
            routings = [layer.feed_forward.routing(each) for each in (rows, self.original.rows[index])]
            for unit in units:
                block = self._block(unit, (rows, self.original.rows[index]), routings)
                units[unit] = self._mlp((index, unit), units[unit], block)
            hidden = self.model.through(index, after, rows)

    def _block(self, unit: str, rows: tuple[Tensor, Tensor], routings: list[Routing | None]) -> Block:
        count = len(rows[0])
        taken = UnitRows(count)
        if unit.isdigit():
            assert routings[0] is not None
            taken = expert_rows(int(unit), routings[0], routings[1], self.min_tokens)
        tokens = torch.arange(count) if taken.rows is None else taken.rows
        inputs, original = (each[tokens] for each in rows)
        if taken.scores is not None and taken.kept is not None:
            inputs = inputs * taken.scores
            original = torch.where(taken.kept[:, None], original * taken.original_scores, inputs)
        weight = torch.ones(taken.count) if taken.weights is None else taken.weights
        return Block(inputs, original, weight, taken.kept, tokens)

    def _mlp(self, unit: tuple[int, str], mlp: Mlp, block: Block) -> Mlp:
        before = {name: block.original @ mlp[name].T for name in (GATE, UP)}
        found = {name: self._matrix((*unit, name), mlp, block, block.inputs, block.original) for name in (GATE, UP)}
        after = {name: block.inputs @ found[name].T for name in (GATE, UP)}
        inner, original = (functional.silu(each[GATE]) * each[UP] for each in (after, before))
        if block.kept is not None:
            original = torch.where(block.kept[:, None], original, inner)
        return found | {DOWN: self._matrix((*unit, DOWN), mlp, block, inner, original)}

    def _matrix(self, key: Key, mlp: Mlp, block: Block, inputs: Tensor, original: Tensor) -> Tensor:
        weight = mlp[key[2]]
        if self.method.groups:
            values = torch.cat(
                [
                    self._solved(part, Inputs.of(inputs, original, block.weight * counts), None)
                    for part, counts in zip(weight.chunk(self.method.groups), self._counts(key, block), strict=True)
                ]
            )
        else:
            outputs = self._outputs(key, mlp, block) if self.method.outputs else None
            values = self._solved(weight, Inputs.of(inputs, original, block.weight), outputs, fold=key[2] == DOWN)
        return values.bfloat16().float()

    def _counts(self, key: Key, block: Block) -> list[Tensor]:
        """How much each token counts for each group of outputs: 1 where there is no gradient."""
        squares = self.fisher.squares[key][block.tokens].unflatten(1, (self.method.groups, -1)).mean(2)
        return list((squares / squares.nanmean(0)).nan_to_num(1.0).T)

    def _solved(self, weight: Tensor, inputs: Inputs, outputs: Tensor | None, fold: bool = False) -> Tensor:
        task = Task(weight, inputs, self.scheme, self.options)

        def solve(task: Task) -> Solved:
            return self._one(task, outputs)

        if fold and self.method.folds:
            return best_of_folds(task, self.method.folds, solve)
        return solve(task).rounded.values()

    def _one(self, task: Task, outputs: Tensor | None) -> Solved:
        method = self.method
        if method.orders > 1:
            return best_of_orders(task, method.orders)
        base = best_of_scales(task, method.scales) if method.scales else today(task)
        if outputs is None:
            return base
        return two_sided(task, outputs, dampening=method.dampening, nested=method.nested, base=base)

    def _outputs(self, key: Key, mlp: Mlp, block: Block) -> Tensor:
        """H_O [out, out] with a mean diagonal of 1."""
        method = self.method
        if method.outputs == "own" and key in self.fisher.count and not method.shrink:
            return _normed(self.fisher.mean(key))
        carried = _normed(self._carried(key, mlp, block))
        if method.outputs != "own" or key not in self.fisher.count:
            return carried
        own = self.fisher.count[key]
        return (own * _normed(self.fisher.mean(key)) + method.shrink * carried) / (own + method.shrink)

    def _carried(self, key: Key, mlp: Mlp, block: Block) -> Tensor:
        """The layer's H_O, carried back through the MLP to the outputs of one of its matrices."""
        index, unit, name = key
        whole = "shared" if unit.isdigit() else unit
        end = self._end(index, whole)
        given = UnitBlock(block.inputs, block.original, block.weight, block.kept)
        ends = Ends(end, mlp, functional.silu, lambda: [given])
        return ends.moments(name, ends.before_down())

    def _end(self, index: int, whole: str) -> Tensor:
        """H_O of what a layer adds to the hidden states [hidden, hidden]; `whole` is its MLP of all tokens."""
        model = self.model
        match self.method.outputs:
            case "local":
                return torch.eye(model.causal.config.hidden_size)
            case "vocabulary":
                head = model.causal.lm_head.weight * model.causal.model.norm.weight
                return (head - head.mean(0)).T @ (head - head.mean(0))
            case "last":
                index = len(model.layers) - 1
                whole = "dense" if model.layers[index].feed_forward.router is None else "shared"
        return self.fisher.mean((index, whole, DOWN))


def _normed(outer: Tensor) -> Tensor:
    return outer / outer.diagonal().mean()


@torch.no_grad()
def kl_of(model: Model, ids: Tensor, reference: list[Tensor]) -> Tensor:
    """KL(reference || model) of every token [sequences, length]."""
    pairs = zip(model.log_probs(ids), reference, strict=True)
    return torch.cat([(before.exp() * (before - after)).sum(-1) for after, before in pairs]).double()


def compared(kl: Tensor, base: Tensor) -> dict[str, float]:
    """Mean and 99th percentile of KLs [sequences, length], and their ratios to `base` on the same tokens."""
    draw = torch.Generator().manual_seed(0)
    again = [torch.randint(len(kl), (len(kl),), generator=draw) for _ in range(400)]
    found = {}
    for name, of in (("mean", torch.mean), ("p99", lambda tokens: tokens.flatten().quantile(0.99))):
        ratios = torch.stack([of(kl[rows]) / of(base[rows]) for rows in again])
        found |= {name: float(of(kl)), f"{name}_ratio": float(of(kl) / of(base)), f"{name}_error": float(ratios.std())}
    return found


def windows(source: str, text: str, length: int) -> Tensor:
    """All whole windows of a text [windows, length]."""
    ids = AutoTokenizer.from_pretrained(source)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def drawn(text: Tensor, samples: int, seed: int) -> Tensor:
    """`samples` windows, whole batches of them."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    return text[order[: samples // BATCH * BATCH]]


def prepared(model: Model, ids: Tensor, seed: int, sources: set[str]) -> Original:
    """The original's rows, and the backward passes that are needed: of the model, and of it rounded."""
    rows, fishers = rows_of(model, ids), {"samples": Fisher()}
    if "samples" in sources:
        fishers["samples"] = fisher_of(model, ids, GROUPS, own_samples(seed))
    original = Original(ids, rows, fishers)
    if "samples and routers" in sources:
        with with_routers(model, own_samples(seed), seed) as loss:
            fishers["samples and routers"] = fisher_of(model, ids, GROUPS, loss)
    if "divergence" in sources:
        with torch.no_grad():
            reference = torch.cat(list(model.log_probs(ids)))
        before = model.weights()
        Solver(model, original, Method()).solve()
        fishers["divergence"] = fisher_of(model, ids, GROUPS, divergence(reference))
        model.put(before)
    return original


def measure(model: Model, original: Original, method: Method, heldout: Tensor, reference: list[Tensor]) -> Tensor:
    """KL of every held-out token [sequences, length]; the model is left as it was."""
    before = model.weights()
    Solver(model, original, method).solve()
    found = kl_of(model, heldout, reference)
    model.put(before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--heldout-samples", type=int, default=80)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.source, options.length)
    calibration, heldout = (
        windows(options.source, text, options.length) for text in (options.calibration, options.heldout)
    )
    heldout = heldout[: options.heldout_samples // BATCH * BATCH]
    with torch.no_grad():
        reference = list(model.log_probs(heldout))
    chosen = {name: METHODS[name] for name in ("today", *options.only)}
    sources = {method.source for method in chosen.values() if method.outputs or method.groups}
    for seed in options.seeds:
        original = prepared(model, drawn(calibration, options.samples, seed), seed, sources)
        base = None
        for name, method in chosen.items():
            started = time.process_time()
            kl = measure(model, original, method, heldout, reference)
            base = kl if base is None else base
            row = compared(kl, base)
            print(
                f"seed {seed} {name:28} {row['mean']:9.6f} {row['mean_ratio']:6.3f} +- {row['mean_error']:.3f}"
                f"  p99 {row['p99']:8.5f} {row['p99_ratio']:6.3f} +- {row['p99_error']:.3f}"
                f" {time.process_time() - started:6.1f} s",
                flush=True,
            )
    print(json.dumps({"tokens": heldout.numel(), "calibration": original.ids.numel(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
