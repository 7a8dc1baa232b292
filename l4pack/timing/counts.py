"""What solving and running the parts of a model takes, from shapes alone.

Counts of products are what torch is given to do: a test holds them against a counter of dispatched operations. The widths
of blocks and tiles are those of the solver, which a test compares, for this file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from l4pack.model.config import Llama4Config, TextConfig
from l4pack.model.parts import KEY, QUERY, attention_shapes, projector_shapes, vision_shapes
from l4pack.quant.grid import ScaleDtype
from l4pack.quant.scheme import Observer, Scheme
from l4pack.recipe import GptqOptions, RecipeScheme
from l4pack.stream.rows import HEAD_ROWS, IMAGE_TILES, TOKENS_SCORED, rows_at_once
from l4pack.timing.work import Kind, Work
from l4pack.work.device import CPU

BLOCK = 128  # columns that GPTQ rounds before the others learn of it
TILE = 512  # columns of a product with a triangular matrix
INVERTED_AT_ONCE = 256  # columns of a triangular matrix that are inverted without products
MOMENT_TILE = 1024  # columns of a product on and above a Hessian's diagonal
THIN = 0.4  # inputs a column, up to which solving goes through the inputs
FLOAT = 4  # bytes

# Operations started by one piece of rows, counted on the CPU's way: they matter where matrices are small.
CALLS_A_BLOCK, CALLS_A_PIECE, CALLS_A_FACTOR, CALLS_A_FACTOR_BLOCK, CALLS_A_FORWARD = 20, 300, 100, 20, 20
# On a GPU one kernel takes a block's columns, of all experts of a batch, where levels are integers: operations started for a
# block, and for one in a sweep; operations on numbers that the kernel makes of each weight, and the bytes that pass to it and
# back.
CALLS_A_DEVICE_BLOCK, CALLS_A_DEVICE_TURN = 20, 25
OPERATIONS_A_COLUMN, OPERATIONS_A_TURN = 8 * BLOCK, 10 * BLOCK
BYTES_A_COLUMN, BYTES_A_TURN = 80, 120
# Where a matrix is not solved together with others, not even with itself as a batch of one, and where levels are floats, torch
# takes a GPU's columns one by one: operations started for each, and in a sweep.
ALONE, CALLS_A_COLUMN, CALLS_A_TURN = 0, 14, 16
# Of floats, by one core: NVFP4's ten candidates for a scale beside the four of integers, and a turn of a sweep, which
# rounds to numbers that lie apart differently. Powers of two have three candidates, which take what integers' do.
NVFP4_CANDIDATES, FLOAT_TURN = 2.3, 2.5
# By both sides: what a weight of a tile takes where its rows wait for one another too, and one that takes a turn in a sweep,
# in those of GPTQ's own kernels; of the products that spread a tile's moves over all rows the share that has any, as a weight
# in 150 moves; and the operations that a tile starts, solved and in a sweep.
NESTED_COLUMN, NESTED_TURN, MOVING = 2.5, 5, 0.3
CALLS_A_TILE, CALLS_A_TILE_TURN = 25, 20
# On a GPU all tiles of a diagonal, of all experts of a batch, are one kernel, and so are those of a turn in a sweep: operations
# started for a diagonal, for a tile that the rest learns of, and for a turn; and steps of those kernels that wait for one
# another. Of a tile's 255 diagonals, eight terms of what lies beside and above are a step, and six more; of its 128 columns, eight
# columns before, and seven more, three of them because about one weight moves.
CALLS_A_DIAGONAL, CALLS_A_DEVICE_TILE, CALLS_A_DEVICE_TILE_TURN = 25, 5, 5
STEPS_A_DIAGONAL, STEPS_A_TILE_TURN = 7_700, 2_000
SLOPES = 12  # passes over the tokens' slopes by which gradients are carried back
# Passes over the weights that solving makes between products: residuals, squares, copies, levels; read and written.
PASSES = 60


@dataclass(frozen=True)
class Tokens:
    """The inputs of a unit: those it is solved for, and its own among them, which go through it; in `streams` of hidden
    states."""

    solved: float
    own: float
    streams: int


def product(rows: float, columns: float, inner: float) -> float:
    """Operations of a dense product."""
    return 2.0 * rows * columns * inner


def solving_mlp(
    text: TextConfig, inner: int, tokens: Tokens, scheme: RecipeScheme, device: str, together: int = 1
) -> Work:
    """Solving gate, up and down of an MLP of that inner width, on a device `together` with others."""
    assert scheme.gptq is not None
    hidden, work = text.hidden_size, Work()
    cross = tokens.streams > 1 and scheme.gptq.asymmetric > 0
    solver = _Solver(scheme, tokens.solved, cross, device, together)
    work.include(solver.problem(hidden, outputs=2 * inner))
    work.include(solver.matrix(inner, hidden, among=2 * inner), times=2)
    sides = tokens.streams
    work.add("moments", Kind.TENSOR, sides * 2 * product(tokens.solved, inner, hidden))
    work.add("moments", Kind.MEMORY, sides * tokens.solved * (8 * hidden + 16 * inner) * FLOAT)
    work.include(solver.problem(inner, outputs=hidden))
    work.include(solver.matrix(hidden, inner, among=hidden))
    if scheme.gptq.two_sided:
        work.include(solver.carried_back(hidden, inner))
        work.include(solver.by_both_sides(inner, hidden), times=2)
        work.include(solver.by_both_sides(hidden, inner, shared=True))
    return work


def solving_attention(text: TextConfig, tokens: Tokens, length: int, scheme: RecipeScheme, device: str) -> Work:
    """Solving a layer's attention on sequences of that length: queries, keys and values for its inputs, the output
    projection for what comes of them in every stream, each matrix by itself on any device."""
    assert scheme.gptq is not None
    shapes, work = attention_shapes(text), Work()
    (queries, hidden), (keys, _) = shapes[QUERY], shapes[KEY]
    cross = tokens.streams > 1 and scheme.gptq.asymmetric > 0
    solver = _Solver(scheme, tokens.solved, cross, device, ALONE)
    work.include(solver.problem(hidden, outputs=queries + 2 * keys))
    for outputs in (queries, keys, keys):
        work.include(solver.matrix(outputs, hidden, among=queries + 2 * keys))
    rows = (2 if cross else 1) * tokens.solved
    work.add("moments", Kind.TENSOR, product(rows, queries + 2 * keys, hidden) + product(rows, queries, length))
    work.add("moments", Kind.MEMORY, FLOAT * rows * (24 * hidden + 24 * queries))
    work.include(solver.problem(queries, outputs=hidden))
    work.include(solver.matrix(hidden, queries, among=hidden))
    return work


@dataclass(frozen=True)
class _Solver:
    """GPTQ of one MLP's matrices, for so many inputs, with the original's too if there is a `cross` moment."""

    scheme: RecipeScheme
    tokens: float
    cross: bool
    device: str
    together: int

    def thin(self, width: int) -> bool:
        """Whether a matrix of that many inputs is solved through its tokens."""
        return self.device == CPU and not self._options.two_sided and self.tokens <= int(THIN * width)

    def problem(self, width: int, outputs: int) -> Work:
        """Moments of inputs of that width, and the Hessian's factor."""
        work = Work()
        self._moments(work, width)
        if self.thin(width):
            self._thin_factor(work, width)
        else:
            self._factor(work, width)
            if self.cross and outputs > width:  # C H^-1 is found once
                work.add("target", Kind.PRODUCT, 2 * _triangular(width, width))
        return work

    def matrix(self, outputs: int, width: int, among: int) -> Work:
        """One matrix [outputs, width] of a problem that is prepared for so many outputs."""
        work = Work()
        self._nearest(work, outputs * width, 2 if self.cross else 1)
        if self.thin(width):
            self._thin_products(work, outputs, width)
        else:
            self._products(work, outputs, width, shifting=among > width)
        work.add("the rest of solving", Kind.MEMORY, PASSES * FLOAT * outputs * width)
        if self.device == CPU:
            self._loops(work, outputs, width)
        elif self.together == ALONE:
            self._loops_by_column(work, outputs, width)
        elif not self.scheme.grid.even:
            self._loops_of_floats(work, outputs, width)
        else:
            self._loops_on_device(work, outputs, width)
        return work

    def _loops(self, work: Work, outputs: int, width: int) -> None:
        """The loops over columns as kernels, some rows at a time."""
        weights, pieces = outputs * width, math.ceil(outputs / rows_at_once(self.device, width))
        work.add("columns", Kind.COLUMNS, weights * BLOCK)
        turns = self._sweep_count * weights * (1 if self.scheme.grid.even else FLOAT_TURN)
        work.add("sweeps", Kind.VISITS, turns)
        work.add("sweeps", Kind.MOVES, turns * width)
        calls = CALLS_A_PIECE + CALLS_A_BLOCK * math.ceil(width / BLOCK)
        work.add("the rest of solving", Kind.CALL, pieces * calls)

    def _loops_on_device(self, work: Work, outputs: int, width: int) -> None:
        """The same as one kernel for a block's columns in all rows."""
        weights, sweeps, blocks = outputs * width, self._sweep_count, math.ceil(width / BLOCK)
        work.add("columns", Kind.CALL, (CALLS_A_PIECE + CALLS_A_DEVICE_BLOCK * blocks) / self.together)
        work.add("columns", Kind.UPDATE, OPERATIONS_A_COLUMN * weights)
        work.add("columns", Kind.MEMORY, BYTES_A_COLUMN * weights)
        work.add("sweeps", Kind.CALL, sweeps * CALLS_A_DEVICE_TURN * blocks / self.together)
        work.add("sweeps", Kind.UPDATE, sweeps * OPERATIONS_A_TURN * weights)
        work.add("sweeps", Kind.MEMORY, sweeps * BYTES_A_TURN * weights)
        work.add("sweeps", Kind.PRODUCT, sweeps * product(outputs, width, width))

    def _loops_by_column(self, work: Work, outputs: int, width: int) -> None:
        """The same in operations of their own for every column, some rows at a time."""
        pieces = math.ceil(outputs / rows_at_once(self.device, width))
        work.add("columns", Kind.CALL, pieces * width * CALLS_A_COLUMN)
        work.add("sweeps", Kind.CALL, pieces * width * self._sweep_count * CALLS_A_TURN)
        work.add("sweeps", Kind.PRODUCT, self._sweep_count * product(outputs, width, width))

    def _loops_of_floats(self, work: Work, outputs: int, width: int) -> None:
        """The same in operations of their own for every column of a batch's matrices, which pass over what is left of a block,
        and in a sweep over all of it."""
        weights, sweeps = outputs * width, self._sweep_count
        work.add("columns", Kind.CALL, width * CALLS_A_COLUMN / self.together)
        work.add("columns", Kind.MEMORY, 2 * FLOAT * (BLOCK / 2 + CALLS_A_COLUMN) * weights)
        work.add("sweeps", Kind.CALL, sweeps * width * CALLS_A_TURN / self.together)
        work.add("sweeps", Kind.MEMORY, sweeps * 2 * FLOAT * (BLOCK + CALLS_A_TURN) * weights)
        work.add("sweeps", Kind.PRODUCT, sweeps * product(outputs, width, width))

    def carried_back(self, hidden: int, inner: int) -> Work:
        """A layer's moments of gradients as moments of what gate and up put out."""
        work, phase = Work(), "gradients carried back"
        triangle = sum(product(self.tokens, size, inner - first) for first, size in _tiles(inner, MOMENT_TILE))
        work.add(phase, Kind.PRODUCT, product(hidden, inner, hidden) + product(inner, inner, hidden))
        work.add(phase, Kind.TENSOR, 3 * product(self.tokens, inner, hidden) + 2 * triangle)
        work.add(phase, Kind.MEMORY, FLOAT * (2 * SLOPES * self.tokens * inner + 12 * inner * inner))
        return work

    def by_both_sides(self, outputs: int, width: int, *, shared: bool = False) -> Work:
        """What one matrix [outputs, width] takes more: its outputs' factor, which on a device others `shared`, losses, a nested
        solve and sweeps."""
        work, factor = Work(), Work()
        self._factor(factor, outputs)
        work.include(factor, 1 / self.together if shared and self.device != CPU else 1)
        self._nearest(work, outputs * width, 1)
        work.add("losses of both sides", Kind.PRODUCT, _triangular(outputs, width))
        self._divide_both_sides(work, "losses of both sides", outputs, width, 2)
        below = sum(product(width, outputs - end, size) for end, size in _ends(outputs, BLOCK))
        beside = sum(product(outputs, width - end, size) for end, size in _ends(width, BLOCK))
        work.add("both sides", Kind.UPDATE, below + beside + _within(outputs, width))
        work.add("both sides", Kind.MEMORY, PASSES / 2 * FLOAT * outputs * width)
        grid = math.ceil(outputs / BLOCK), math.ceil(width / BLOCK)
        (self._tiles_on_device if self.device != CPU else self._tiles)(work, outputs * width, *grid)
        if self._sweep_count:
            self._sweep_both_sides(work, outputs, width, grid[0] * grid[1])
        return work

    def _tiles(self, work: Work, weights: int, down: int, along: int) -> None:
        """The insides of a nested solve's tiles, a weight after the other."""
        work.add("both sides", Kind.COLUMNS, NESTED_COLUMN * BLOCK * weights)
        work.add("both sides", Kind.CALL, CALLS_A_TILE * down * along)

    def _tiles_on_device(self, work: Work, weights: int, down: int, along: int) -> None:
        """The same, all tiles of a diagonal at once."""
        calls = CALLS_A_DIAGONAL * (down + along - 1) + CALLS_A_DEVICE_TILE * down * along
        work.add("both sides", Kind.CALL, calls / self.together)
        work.add("both sides", Kind.STEP, STEPS_A_DIAGONAL * (down + along - 1) / self.together)
        work.add("both sides", Kind.MEMORY, BYTES_A_COLUMN * weights)

    def _sweep_both_sides(self, work: Work, outputs: int, width: int, tiles: int) -> None:
        phase, count, weights = "sweeps of both sides", self._sweep_count, outputs * width
        self._divide_both_sides(work, phase, outputs, width, 1)
        spread = (MOVING if self.device == CPU else 1) * product(width, outputs, outputs)
        work.add(phase, Kind.UPDATE, count * (product(outputs, width, width) + _within(outputs, width) + spread))
        if self.device != CPU:
            work.add(phase, Kind.CALL, count * CALLS_A_DEVICE_TILE_TURN * tiles / self.together)
            work.add(phase, Kind.STEP, count * STEPS_A_TILE_TURN * tiles / self.together)
            work.add(phase, Kind.MEMORY, count * BYTES_A_TURN * weights)
            return
        turns = NESTED_TURN * (1 if self.scheme.grid.even else FLOAT_TURN)
        work.add(phase, Kind.VISITS, count * turns * weights)
        work.add(phase, Kind.MEMORY, count * 4 * FLOAT * outputs * BLOCK * tiles)
        work.add(phase, Kind.CALL, count * CALLS_A_TILE_TURN * tiles)

    def _divide_both_sides(self, work: Work, phase: str, outputs: int, width: int, times: int) -> None:
        """A matrix divided by the factors of both sides."""
        for rows, size in ((outputs, width), (width, outputs)):
            dividing = sum(product(rows, part, size - end) for end, part in _ends(size, TILE))
            work.add(phase, Kind.PRODUCT, times * dividing)
            work.add(phase, Kind.CHOLESKY, times * sum(rows * part * part for _, part in _tiles(size, TILE)))

    @property
    def _options(self) -> GptqOptions:
        assert self.scheme.gptq is not None
        return self.scheme.gptq

    @property
    def _sweep_count(self) -> int:
        return self._options.sweeps

    def _moments(self, work: Work, width: int) -> None:
        triangle = sum(product(self.tokens, size, width - first) for first, size in _tiles(width, MOMENT_TILE))
        work.add("moments", Kind.TENSOR, triangle)
        if self.cross and not self.thin(width):
            work.add("moments", Kind.TENSOR, product(width, width, self.tokens))
        work.add("moments", Kind.MEMORY, FLOAT * (6 * self.tokens * width + 4 * width * width))

    def _factor(self, work: Work, width: int) -> None:
        leaves = math.ceil(width / INVERTED_AT_ONCE)
        work.add("factorization", Kind.CHOLESKY, width**3 / 3 + leaves * (width / leaves) ** 3)
        work.add("factorization", Kind.PRODUCT, inverting(width))
        work.add("factorization", Kind.MEMORY, 16 * FLOAT * width * width)
        work.add("factorization", Kind.CALL, CALLS_A_FACTOR + 8 * CALLS_A_FACTOR_BLOCK * leaves)

    def _thin_factor(self, work: Work, width: int) -> None:
        n = self.tokens
        for _, block in _tiles(width, BLOCK):
            updates = 2 * product(n, n, block) + 2 * product(n, block, block) + product(block, block, n)
            work.add("factorization", Kind.PRODUCT64, updates)
        work.add("factorization", Kind.CALL, CALLS_A_FACTOR_BLOCK * math.ceil(width / BLOCK))
        work.add("factorization", Kind.MEMORY, 2 * 8 * n * n * math.ceil(width / BLOCK))
        if self.cross:
            work.add("target", Kind.PRODUCT64, product(n, width, n))

    def _nearest(self, work: Work, weights: int, times: int) -> None:
        kind = Kind.NEAREST_MSE if self.scheme.observer is Observer.MSE else Kind.NEAREST
        work.add("rounding to nearest", kind, weights * _candidates(self.scheme) * times)

    def _products(self, work: Work, outputs: int, width: int, *, shifting: bool) -> None:
        if self.cross:
            work.add("target", Kind.PRODUCT, product(outputs, width, width))
        if self.cross and not shifting:
            work.add("target", Kind.PRODUCT, 2 * _triangular(outputs, width))
        work.add("columns", Kind.UPDATE, sum(product(outputs, width - end, size) for end, size in _ends(width, BLOCK)))
        if self._sweep_count:
            dividing = sum(product(outputs, size, width - end) for end, size in _ends(width, TILE))
            work.add("sweeps", Kind.PRODUCT, dividing)
            work.add("sweeps", Kind.CHOLESKY, sum(outputs * size * size for _, size in _tiles(width, TILE)))
        work.add("loss of rounding", Kind.PRODUCT, _triangular(outputs, width))

    def _thin_products(self, work: Work, outputs: int, width: int) -> None:
        through = product(outputs, width, self.tokens)
        if self.cross:
            work.add("target", Kind.PRODUCT, 2 * through)
        work.add("columns", Kind.UPDATE, 2 * through)
        if self._sweep_count:
            work.add("sweeps", Kind.PRODUCT, through)
        work.add("loss of rounding", Kind.PRODUCT, through)


def inverting(size: int) -> float:
    """Operations of products that inverting a triangular matrix takes."""
    if size <= INVERTED_AT_ONCE:
        return 0.0
    half = size // 2
    rest = size - half
    return inverting(half) + inverting(rest) + _triangular(half, rest) + _triangular(rest, half)


def _triangular(rows: float, size: int) -> float:
    """Operations of a product [rows, size] with a triangular matrix, tile by tile."""
    return sum(product(rows, width, first + width) for first, width in _tiles(size, TILE))


def _within(outputs: int, width: int) -> float:
    """Operations of products with the blocks on a factor's diagonal, or a Hessian's."""
    return sum(product(outputs, size, size) for _, size in _tiles(width, BLOCK))


def _tiles(size: int, step: int) -> Iterator[tuple[int, int]]:
    """Where each tile begins, and its width."""
    for first in range(0, size, step):
        yield first, min(step, size - first)


def _ends(size: int, step: int) -> Iterator[tuple[int, int]]:
    for first, width in _tiles(size, step):
        yield first + width, width


def running_mlp(text: TextConfig, inner: int, tokens: float, kind: Kind, phase: str, device: str) -> Work:
    """Tokens through an MLP of that inner width, their rows gathered and put back."""
    hidden, work = text.hidden_size, Work()
    work.add(phase, kind, 3 * product(tokens, inner, hidden))
    work.add(phase, Kind.MEMORY, FLOAT * tokens * (24 * hidden + 16 * inner))
    work.add(phase, Kind.CALL, CALLS_A_FORWARD * math.ceil(tokens / rows_at_once(device, hidden)))
    return work


def attending(text: TextConfig, tokens: float, length: int, kind: Kind, device: str) -> Work:
    """A layer's attention on sequences of that length, half of whose keys a query sees on average, and its router."""
    work, queries = Work(), text.num_attention_heads * text.head_dim
    weights = sum(math.prod(shape) for shape in attention_shapes(text).values())
    experts = text.num_local_experts if text.moe_layers else 0
    work.add("attention", kind, product(tokens, weights, 1) + product(tokens, queries, length))
    work.add("attention", kind, product(tokens, experts, text.hidden_size))
    work.add("attention", Kind.MEMORY, FLOAT * tokens * (24 * text.hidden_size + 24 * queries))
    work.add("attention", Kind.CALL, 4 * CALLS_A_FORWARD * math.ceil(tokens / rows_at_once(device, text.hidden_size)))
    return work


def rounding(scheme: Scheme, weights: float) -> Work:
    """Rounding weights of a source to nearest, by all threads."""
    work, kind = Work(), Kind.ROUND
    if scheme.observer is Observer.MSE:
        kind = Kind.ROUND_MSE
    elif not scheme.grid.even:
        kind = Kind.ROUND_FLOAT
    work.add("rounding", kind, weights * _candidates(scheme))
    return work


def _candidates(scheme: Scheme) -> float:
    """Of what searching an integer's scale takes."""
    searched = scheme.observer is Observer.MSE and scheme.scale_dtype is ScaleDtype.E4M3
    return NVFP4_CANDIDATES if searched else 1.0


def scoring(text: TextConfig, tokens: float, models: int) -> Work:
    """Answers of models on so many tokens: the head's products, and sums over the vocabulary."""
    work = Work()
    work.add("scoring", Kind.PRODUCT, models * product(tokens, text.vocab_size, text.hidden_size))
    work.add("scoring", Kind.LOGITS, models * tokens * text.vocab_size)
    blocks = math.ceil(tokens / TOKENS_SCORED) * math.ceil(text.vocab_size / HEAD_ROWS)
    work.add("scoring", Kind.CALL, 20 * models * blocks)
    return work


def seeing(config: Llama4Config, tiles: int) -> Work:
    """Tiles of images through the vision tower and the projector, whose weights are widened for a few of them at once."""
    work, vision = Work(), config.vision
    if vision is None or not tiles:
        return work
    hidden, rows, layers = vision.hidden_size, vision.patches + 1, vision.num_hidden_layers
    in_layers = layers * (4 * hidden * hidden + 2 * hidden * vision.intermediate_size)
    shapes = [*vision_shapes(vision).values(), *projector_shapes(vision, config.text).values()]
    weights, features = sum(map(math.prod, shapes)), vision.patches * vision.pixel_shuffle_ratio**2
    work.add("images", Kind.FORWARD, tiles * product(rows, in_layers, 1))
    work.add("images", Kind.FORWARD, tiles * 2 * layers * product(rows, rows, hidden))
    work.add("images", Kind.FORWARD, tiles * product(features, weights - in_layers, 1))
    work.add("images", Kind.MEMORY, FLOAT * tiles * layers * rows * (24 * hidden + 8 * vision.intermediate_size))
    work.add("images", Kind.READ, 2 * weights)
    work.add("images", Kind.WIDEN, math.ceil(tiles / IMAGE_TILES) * weights)
    return work
