"""Operations as planned against those that torch is given: its own counter of dispatched products is the oracle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from l4pack.calibration import batch, batch_units, moments
from l4pack.calibration.attention import solve_attention
from l4pack.calibration.mlp import Matrices, solve_mlp
from l4pack.calibration.rows import Block
from l4pack.checkpoint.open import open_source
from l4pack.evaluate import layer_errors
from l4pack.model.config import TextConfig
from l4pack.model.parts import attention_shapes, mlp_shapes
from l4pack.quant import gptq_batch, gptq_columns, gptq_thin, triangular, two_sided, two_sided_waves
from l4pack.recipe import GptqOptions, Method, RecipeScheme
from l4pack.timing import counts, jobs
from l4pack.timing.jobs import Talk, layer_weights, talking
from l4pack.timing.work import Kind

HIDDEN, INNER = 384, 640
PRODUCTS = (Kind.PRODUCT, Kind.TENSOR, Kind.UPDATE, Kind.PRODUCT64, Kind.FORWARD)


class Dispatched(TorchDispatchMode):
    """Counts operations of the products that torch is given: `torch.utils.flop_counter` knows none made in place."""

    def __init__(self, batched=False):
        super().__init__()
        self.products = self.calls = 0
        self.batched = batched

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        name = function.overloadpacket.__name__.removesuffix("_")
        assert self.batched or name not in ("bmm", "baddbmm", "einsum"), name
        result = function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "matmul", "bmm", "baddbmm"):
            self.products += 2 * result.numel() * args[-1].shape[-2]
        return result


def scheme(**options):
    gptq_options = GptqOptions(**{"sweeps": 2, **options})
    return RecipeScheme(format="pack-quantized", num_bits=4, group_size=128, method=Method.GPTQ, gptq=gptq_options)


def text(**sizes):
    return TextConfig(**{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": 4, **sizes})


def dispatched(tokens, streams, wanted, outputs=None):
    """Operations of products that solving one MLP gives torch to do."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.05 for name, shape in mlp_shapes(HIDDEN, INNER).items()
    }
    inputs = torch.randn(tokens, HIDDEN, generator=generator)
    original = None if streams == 1 else inputs + 0.01 * torch.randn(tokens, HIDDEN, generator=generator)
    blocks = [Block(inputs, original, None, None)]
    with torch.inference_mode(), Dispatched() as counter:
        mlp = Matrices(weights, silu, torch.bfloat16)
        solve_mlp(mlp, lambda: blocks, wanted, dict.fromkeys(weights, "BF16"), outputs)
    return counter.products


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("tokens", [100, 200, 600], ids=["thin", "thin for down alone", "thick"])
def test_solving_an_mlp(tokens, streams):
    wanted = scheme()
    planned = counts.solving_mlp(text(), INNER, counts.Tokens(tokens, tokens, streams), wanted, "cpu")
    assert planned.total(*PRODUCTS) == pytest.approx(dispatched(tokens, streams, wanted), rel=0.01)


@dataclass
class GivenAttention:
    """Attention of known heads, whatever its projections are: running it is counted apart."""

    matrices: dict[str, torch.Tensor]
    blocks: dict[str, list[Block]]
    quantized: Any
    model_dtype = torch.bfloat16

    def matrix(self, name):
        return self.matrices[name]

    def inputs(self):
        return self.blocks["inputs"]

    def heads(self, solved):
        assert len(solved) == 3
        return self.blocks["heads"]


@pytest.mark.parametrize("tokens", [100, 700], ids=["thin", "thick"])
def test_solving_attention(tokens):
    wanted, shape, length = scheme(), text(num_attention_heads=5, num_key_value_heads=1, head_dim=128), 50
    generator = torch.Generator().manual_seed(0)
    given = {width: torch.randn(2, tokens, width, generator=generator) for width in (HIDDEN, 5 * 128)}
    inputs, heads = ([Block(*given[width], None, None)] for width in (HIDDEN, 5 * 128))
    matrices = {
        f"self_attn.{name}": torch.randn(size, generator=generator) for name, size in attention_shapes(shape).items()
    }
    attention = GivenAttention(matrices, {"inputs": inputs, "heads": heads}, SimpleNamespace(tokens=tokens))
    with torch.inference_mode(), Dispatched() as counter:
        solve_attention(attention, wanted, dict.fromkeys(matrices, "BF16"))
    planned = counts.solving_attention(shape, counts.Tokens(tokens, tokens, 2), length, wanted, "cpu")
    running = 2 * counts.product(tokens, 7 * 128, HIDDEN) + 2 * counts.product(tokens, 5 * 128, length)
    assert planned.total(*PRODUCTS) - running == pytest.approx(counter.products, rel=0.01)


def test_solving_without_sweeps_or_the_originals_inputs():
    wanted = scheme(sweeps=0, asymmetric=0.0)
    planned = counts.solving_mlp(text(), INNER, counts.Tokens(600, 600, 2), wanted, "cpu")
    assert planned.total(*PRODUCTS) == pytest.approx(dispatched(600, 2, wanted), rel=0.01)


def test_solving_an_mlp_by_both_sides():
    """Without sweeps, whose products depend on what moves."""
    gradients = torch.randn(2 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))
    gradients = gradients * torch.linspace(0.1, 3, HIDDEN)
    outputs, wanted = gradients.T @ gradients, scheme(sweeps=0, two_sided=True)
    planned = counts.solving_mlp(text(), INNER, counts.Tokens(100, 100, 2), wanted, "cpu")
    found = dispatched(100, 2, wanted, outputs)
    assert planned.total(*PRODUCTS) == pytest.approx(found, rel=0.01)
    swept = counts.solving_mlp(text(), INNER, counts.Tokens(100, 100, 2), scheme(two_sided=True), "cpu")
    found = dispatched(100, 2, scheme(two_sided=True), outputs)
    assert swept.total(*PRODUCTS) == pytest.approx(found, rel=0.25)


def test_solving_mlps_together_by_both_sides(monkeypatch):
    """On a device. Insides of blocks and tiles do nothing here: of those it is counted how often they are taken."""
    tiles, units, wanted = Counter(), 3, scheme(two_sided=True)
    for name in ("solve_tiles", "descend_tiles"):
        monkeypatch.setattr(two_sided_waves, name, partial(_nothing, tiles, name))
    monkeypatch.setattr(gptq_columns, "solve_block", lambda block, *_: (block * 0, block * 0))
    monkeypatch.setattr(
        gptq_columns, "descend_block", lambda levels, *_: (levels, levels * 0, levels.sum(-1, dtype=torch.float64))
    )
    generator = torch.Generator().manual_seed(0)
    pair, down = torch.randn(units, 2 * INNER, HIDDEN), torch.randn(units, HIDDEN, INNER)
    inputs = torch.randn(units, batch.ROWS, HIDDEN, generator=generator)
    blocks = [batch_units.Block(inputs, inputs * 1.01, torch.ones(units, batch.ROWS), None)]
    weights = torch.full((units,), float(batch.ROWS))
    given = batch_units.Batch(
        batch_units.Stacked(pair, down), lambda: blocks, weights, silu, torch.bfloat16, torch.eye(HIDDEN)
    )
    with torch.inference_mode(), Dispatched(batched=True) as counter:
        batch.solve(given, wanted, "BF16")
    tokens = counts.Tokens(batch.ROWS, batch.ROWS, 2)
    planned = counts.solving_mlp(text(), INNER, tokens, wanted, "cuda", together=units)
    within = 3 * HIDDEN * INNER * (counts.OPERATIONS_A_COLUMN + 2 * counts.OPERATIONS_A_TURN)
    assert units * (planned.total(*PRODUCTS) - within) == pytest.approx(counter.products, rel=0.02)
    steps = tiles["solve_tiles"] * counts.STEPS_A_DIAGONAL + tiles["descend_tiles"] * counts.STEPS_A_TILE_TURN
    assert units * planned.total(Kind.STEP) == pytest.approx(steps)


def _nothing(tiles, name, *given):
    tiles[name] += 1
    return two_sided_waves.SolvedTile(*3 * [given[0] * 0]) if name == "solve_tiles" else given[1] * 0


def test_the_solver_cuts_as_is_counted():
    assert two_sided.TILE == counts.BLOCK
    assert (counts.TILE, counts.INVERTED_AT_ONCE) == (triangular.TILE, triangular.INVERT_AT_ONCE)
    assert counts.BLOCK == gptq_thin.BLOCK
    assert (counts.MOMENT_TILE, counts.THIN) == (moments.COLUMNS, moments.THIN)
    assert (jobs.SAMPLE_ROWS, jobs.SAMPLED_SHARE) == (layer_errors.SAMPLE_ROWS, layer_errors.SAMPLED_SHARE)
    assert gptq_batch.BLOCK == counts.BLOCK


def test_a_sample_reads_all_layers_once_and_then_what_its_tokens_take():
    scout = open_source("llama-4-scout")
    text, weights = scout.config.text, layer_weights(scout)
    routed, head = 2 * 96_636_764_160, 2 * 1_034_485_760
    assert weights.routed == routed
    rest = weights.nbytes - routed + head
    assert Talk(2, 32, 1).read_bytes(text, [weights]) == weights.nbytes + head
    assert Talk(2, 32, 8).read_bytes(text, [weights]) == 8 * rest + routed + 7 * routed // 8
    assert Talk(99, 32, 2).read_bytes(text, [weights, weights]) == 2 * (2 * rest + 2 * routed)
    assert Talk(2, 32, 0).record(text, [weights]) is None
    read = talking(text, [weights], Talk(2, 32, 8)).total(Kind.READ)
    assert read == pytest.approx(Talk(2, 32, 8).read_bytes(text, [weights]))


def test_four_bit_floats_take_what_trying_their_scales_and_levels_does():
    shape = {"num_bits": 4, "type": "float", "observer": "mse", "method": Method.GPTQ, "gptq": GptqOptions(sweeps=2)}
    nvfp4 = RecipeScheme(format="nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **shape)
    mxfp4 = RecipeScheme(format="mxfp4-pack-quantized", strategy="group", group_size=32, **shape)
    assert counts.rounding(nvfp4, 100).total(Kind.ROUND_MSE) == 100 * counts.NVFP4_CANDIDATES
    assert counts.rounding(mxfp4, 100).total(Kind.ROUND_MSE) == 100
    tokens = counts.Tokens(solved=600, own=600, streams=1)
    integers, floats = (counts.solving_mlp(text(), INNER, tokens, one, "cpu") for one in (scheme(), mxfp4))
    for kind in (Kind.VISITS, Kind.MOVES):
        assert floats.total(kind) == counts.FLOAT_TURN * integers.total(kind)
    assert floats.total(*PRODUCTS) == integers.total(*PRODUCTS)
    alone, few, many = (
        counts.solving_mlp(text(), INNER, tokens, mxfp4, "cuda", together).total(Kind.CALL) for together in (0, 2, 16)
    )
    kernels = counts.solving_mlp(text(), INNER, tokens, scheme(), "cuda", 2)
    assert alone > few > many
    assert few > 1.5 * kernels.total(Kind.CALL)  # on a GPU no kernel takes floats: column by column, of all of a batch
