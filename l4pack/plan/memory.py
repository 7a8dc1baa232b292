"""What a job takes of memory, the machine's and a device's: one model, that every command plans and refuses by.

    machine = what the loaded libraries take + what is held + the widest of the phases that follow one another

Where a device computes, what is held and the phases lie there, and the machine holds what is on its way to it. Sizes are
of shapes alone; what a phase holds was counted in the code that runs it, and is kept to by benchmarks that fail when
more was resident than planned (`benchmarks/real_size_gptq.py`, `benchmarks/moe_layer.py`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4pack.errors import BudgetError
from l4pack.model.config import Llama4Config, TextConfig, VisionConfig
from l4pack.model.parts import OUTPUT, VISION_LAYERS, attention_shapes, mlp_shapes, projector_shapes, vision_shapes
from l4pack.model.tensors import Role
from l4pack.plan.assign import Action, Task
from l4pack.stream.rows import HEAD_ROWS, IMAGE_TILES, TILE_OUTPUTS, TOKENS_SCORED, rows_at_once
from l4pack.units import MIB, human_bytes
from l4pack.work.device import CPU
from l4pack.work.machine import Room

if TYPE_CHECKING:
    from l4pack.stream.compute import Compute
    from l4pack.stream.hidden import TokenSequence

# Resident before the first buffer, by what a command loads. Measured with a model of a few megabytes on a machine of two
# cores, Numba's cache empty so that it compiles; a tenth more, up to the next 32 MiB, for machines with more threads.
KERNELS_LOADED = 288 * MIB  # NumPy, Numba and the kernels: 237 MiB (174 when they are compiled already)
# torch, transformers' Llama 4 and a tokenizer beside them: calibrating the demo on 512 tokens took 666 MiB (561 when they
# are compiled already), its own buffers of about 30 included.
MODEL_LOADED = 704 * MIB
CUDA_LOADED = 2048 * MIB  # torch's CUDA libraries and a context, beside either; not measured here on a device

FLOAT, DOUBLE = 4, 8  # bytes of a float32, and of a float64
STORED = 2  # bytes of a weight in a file
# Device memory that a weight takes while it is quantized with torch: 27 bytes measured over the source with the CPU
# allocator for observer mse, 20 for minmax; the source's own 2 to 4 come on top.
ROUNDED_ON_DEVICE = 32
CUBLAS = 32 * MIB  # its workspaces, eight of 4 MiB, as `stream.compute` sets them for reproducible products
FOLIO = 512 * 1024  # bytes of a file that are mapped at the touch of one of them: 370,000 measured, of rows far apart
# Tokens of each expert that are solved together, and of their matrices the output rows whose scales are looked for and the
# columns that are multiplied at once: `calibration.batch`, `quant.gptq_batch` and `quant.triangular` hold to them.
TOGETHER_ROWS, SCALES_ROWS, PRODUCT_COLUMNS = 512, 1024, 512
DIAGONAL = 12 * 128  # numbers for each of the fewer sides' places of the tiles that lie on a diagonal: twelve a weight
BUFFERS = 3  # of hidden states that a stream has: a layer's inputs, its outputs, and what lies between
SPREAD_BUFFERS = BUFFERS + 1  # where workers of a cluster run it: the shared expert's outputs lie apart
# States of a tile's rows in a layer of the vision tower: in, normed, queries, keys and values before and after they are
# turned, attended, added. Copies of an image as bytes: decoded, turned and in RGB, as a tensor, resized.
VISION_ROWS, DECODED, HOLES = 12, 4, 3
SCORE_BLOCKS = 6  # float64 logits of a block: two models', their powers, and three on the way to a sum


@dataclass(frozen=True)
class Memory:
    """The most bytes a job has at once, resident in the machine and on a device; the latter 0 where the CPU computes."""

    ram: int
    vram: int = 0

    def most(self, other: Memory) -> Memory:
        """What two jobs take that run one after the other."""
        return Memory(max(self.ram, other.ram), max(self.vram, other.vram))


@dataclass(frozen=True)
class Sight:
    """What a vision tower sees: `tiles` of the images of one sequence at most, and `pixels` of the largest image."""

    vision: VisionConfig
    tiles: int
    pixels: int

    def running(self, text: TextConfig, itemsize: int) -> int:
        """The tower on a few tiles: what lies outside its layers, a layer as it is stored and as it is computed with,
        and states on their way through it. Layers and states come and go in turn, so the heap has holes: measured at
        Scout's size, 580 to 673 MB for one tile and 1,027 for three; 330 for one where nothing stays in the heap."""
        vision = self.vision
        shapes = [*vision_shapes(vision).items(), *projector_shapes(vision, text).items()]
        outside = _numbers(shape for name, shape in shapes if not name.startswith(f"{VISION_LAYERS}."))
        layer = _numbers(shape for name, shape in shapes if name.startswith(f"{VISION_LAYERS}.0."))
        rows = min(self.tiles, IMAGE_TILES) * (vision.patches + 1)
        states = rows * (VISION_ROWS * vision.hidden_size + 3 * vision.intermediate_size)
        features = self.tiles * vision.patches * text.hidden_size
        return (outside + HOLES * (layer + states) + features) * itemsize + layer * STORED

    def reading(self) -> int:
        """Images as they are decoded, in three copies on their way to tiles, and the tiles."""
        numbers = self.vision.num_channels * self.vision.image_size**2
        return DECODED * self.vision.num_channels * self.pixels + self.tiles * numbers * (STORED + FLOAT)


def sight_of(vision: VisionConfig | None, sequences: Iterable[TokenSequence]) -> Sight | None:
    """What is to be seen of the sequences' images; None where there are none."""
    seen = [sequence.images for sequence in sequences if sequence.images is not None]
    if vision is None or not seen:
        return None
    return Sight(vision, max(one.tiles for one in seen), max(one.pixels for one in seen))


def seeing(sight: Sight, text: TextConfig, device: str, itemsize: int) -> Memory:
    """Of images being embedded, before any layer of the text model is there."""
    if device == CPU:
        return Memory(MODEL_LOADED + sight.reading() + sight.running(text, itemsize))
    return Memory(MODEL_LOADED + CUDA_LOADED + sight.reading(), CUBLAS + sight.running(text, itemsize))


@dataclass(frozen=True)
class Computing:
    """What decides the memory of running models layer by layer.

    `device` is its kind (`cpu` or `cuda`), `itemsize` the bytes of a number there; `length` is that of the longest
    sequence, `tokens` those of all of a stream's. `models` checkpoints walk beside each other, over `streams` of hidden
    states; with `ahead`, the next unit is loaded while one computes. As many experts are in use `together`; hidden states
    that are `resident` stay on the device. Where `tiles`
    threads widen a tile of a matrix at a time (0: none do), matrices of MLPs are there as they are stored, in `stored`
    bytes a number. With `sight`, there are images. `merging` bytes are taken where adapters are merged as it is read.
    """

    text: TextConfig
    device: str
    itemsize: int
    length: int
    tokens: int
    models: int = 1
    streams: int = 1
    ahead: bool = True
    together: int = 1
    resident: bool = False
    tiles: int = 0
    stored: int = STORED
    sight: Sight | None = None
    merging: int = 0

    @property
    def rows(self) -> int:
        """Rows computed at once."""
        return rows_at_once(self.device, self.text.hidden_size)

    @property
    def row(self) -> int:
        """Bytes of a row of hidden states."""
        return self.text.hidden_size * self.itemsize

    @property
    def attention(self) -> int:
        """Bytes of a layer's attention matrices."""
        return _numbers(attention_shapes(self.text).values()) * self.itemsize

    @property
    def mlp(self) -> int:
        """Bytes of the three matrices of the largest MLP."""
        return mlp_numbers(self.text, widest_mlp(self.text)) * (self.stored if self.tiles else self.itemsize)

    def memory(self, phases: Iterable[int] = (), *, held: int = 0, scored: bool = False) -> Memory:
        """Of a walk in which `held` bytes more are there throughout and other `phases`, with the unit in use, come in
        turn with attention and MLPs; answers may be `scored` at its end."""
        widest = max(self.attending(), self.mlp + self.running(), *phases)
        computing = max(self._held() + held + widest, self._scoring() if scored else 0)
        before = Memory(0) if self.sight is None else seeing(self.sight, self.text, self.device, self.itemsize)
        if self.device == CPU:
            return Memory(MODEL_LOADED + self.merging + self._routing() + self._mapped() + computing).most(before)
        held_here = self.merging + self._routing() + self._mapped() + self._passing()
        return Memory(MODEL_LOADED + CUDA_LOADED + held_here, CUBLAS + computing).most(before)

    def running(self) -> int:
        """Rows in an MLP: states before and after the norm, scaled, and out of it; gate, its activation, up, product.
        Beside them each thread's tile."""
        rows = self.rows * 4 * (self.text.hidden_size + widest_mlp(self.text)) * self.itemsize
        return rows + self.tiles * TILE_OUTPUTS * max(self.text.hidden_size, widest_mlp(self.text)) * FLOAT

    def _held(self) -> int:
        """Each model's attention, which stays while the MLPs of its layer run, and the next unit: its last matrix is
        there as it is stored and as it is computed with. A unit that is not loaded ahead is so before anything else is."""
        loading = (self.together * self.mlp if self.ahead else 0) + _largest_matrix(self.text) * STORED
        states = self.streams * BUFFERS * self.tokens * self.row if self.resident else 0
        return self.models * self.attention + loading + states

    def attending(self) -> int:
        """A block of queries: states in and out, the mask, keys and values repeated for every head, and half as much
        again that the kernel packs. Scores are never there as a whole (measured: 89 MiB beside 256 of keys and values,
        where the scores would be 256)."""
        text = self.text
        only_chunks = len(text.rope_layers) == text.num_hidden_layers and text.attention_chunk_size
        seen = min(self.length, text.attention_chunk_size or self.length) if only_chunks else self.length
        block, heads = min(self.rows, self.length), text.num_attention_heads
        numbers = block * (8 * text.hidden_size + seen) + 3 * seen * heads * text.head_dim
        return numbers * self.itemsize

    def _scoring(self) -> int:
        """A chunk of each model's head in float32, and a block of logits in float64."""
        heads = self.models * HEAD_ROWS * self.text.hidden_size * FLOAT
        return heads + SCORE_BLOCKS * TOKENS_SCORED * HEAD_ROWS * DOUBLE

    def _routing(self) -> int:
        """Float32 logits of the router for every token of every stream, and two copies on the way to a choice."""
        experts = self.text.num_local_experts if self.text.moe_layers else 0
        return (self.streams + 2) * self.tokens * experts * FLOAT

    def _mapped(self) -> int:
        """Pages of two files of hidden states while a block of rows is worked on: an expert's rows lie scattered, and
        each brings its neighbours along. (Measured: 111 MiB of narrow rows that a plan without them did not know.)"""
        return 2 * min(self.tokens * self.row, self.rows * (self.row + FOLIO))

    def _passing(self) -> int:
        """What lies in the machine on its way to a device: gate and up, read and widened, and rows to and fro."""
        pair = 2 * _largest_matrix(self.text) * (STORED + FLOAT)
        return pair + 2 * max(self.rows, self.together * TOGETHER_ROWS) * self.text.hidden_size * FLOAT


def computing_on(
    compute: Compute,
    config: Llama4Config,
    sequences: Sequence[TokenSequence],
    *,
    models: int = 1,
    streams: int = 1,
    merging: int = 0,
) -> Computing:
    """What decides the memory of running these sequences; `merging` is `Checkpoint.merging_bytes`."""
    lengths = [len(sequence.tokens) for sequence in sequences]
    found = Computing(
        config.text, compute.device.type, compute.dtype.itemsize, max(lengths), sum(lengths), models, streams
    )
    return replace(found, sight=sight_of(config.vision, sequences), merging=merging)


@dataclass(frozen=True)
class SolvedKind:
    """Units of a role that are solved: with `cross` moments or not, of which `inner` width MLPs are, and whether by both
    sides."""

    cross: bool
    inner: int
    role: Role
    two_sided: bool = False

    def together(self, most: int) -> int:
        """How many are solved together on a device where that is `most` experts."""
        return most if self.role is Role.ROUTED_EXPERT else min(most, 1)


def calibrating(computing: Computing, kinds: Iterable[SolvedKind], *, attention: bool) -> Memory:
    """Of solving units on the way. With `attention` that is quantized too, what was written is there beside the
    original's."""
    text = computing.text
    # A unit runs as the original's and as it was written; half a matrix of the latter is there in a 16-bit dtype.
    written = computing.mlp + _largest_matrix(text) * STORED + computing.running()
    together = computing.together if computing.device != CPU else 0
    solved = [_solving(computing, kind, kind.together(together)) for kind in kinds]
    levels = together * mlp_numbers(text, widest_mlp(text))  # int8, of those solved last that are being written
    held = (computing.attention if attention else 0) + 2 * levels
    return computing.memory((computing.together * computing.mlp + written, *solved), held=held)


def _solving(computing: Computing, kind: SolvedKind, together: int) -> int:
    """Of units that are solved, their weights with them: as many MLPs `together`, or one by itself (0)."""
    if kind.role is Role.ATTENTION:
        return solving_attention(computing, cross=kind.cross)
    text, weights = computing.text, mlp_numbers(computing.text, kind.inner) * FLOAT
    if not together:
        return weights + solving(text, computing.rows, kind.inner, cross=kind.cross, two_sided=kind.two_sided)
    solved = solving_together(text, kind.inner, together, cross=kind.cross, two_sided=kind.two_sided)
    return together * 2 * weights + solved


def measuring(computing: Computing, *, solved: bool, held: int = 0) -> Memory:
    """Of altered units beside the original's: rounded or `solved` ones are float32, and then in the dtype to run in; `held`
    bytes more are there throughout."""
    text = computing.text
    phases = [3 * computing.mlp, 2 * computing.mlp + computing.running()]
    if solved:
        phases.append(computing.mlp + solving(text, computing.rows, widest_mlp(text), cross=True))
        phases.append(computing.attention + solving_attention(computing, cross=True))
    return computing.memory(phases, held=held, scored=True)


def mlp_numbers(text: TextConfig, inner: int) -> int:
    """Weights of an MLP of some inner width."""
    return _numbers(mlp_shapes(text.hidden_size, inner).values())


def widest_mlp(text: TextConfig) -> int:
    """The inner width of the largest MLP."""
    dense = text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 0
    return max(dense, text.intermediate_size)


def solving(text: TextConfig, rows: int, inner: int, *, cross: bool, two_sided: bool = False) -> int:
    """Bytes beside an MLP's own weights, float32, while GPTQ solves it `rows` output rows at once; `cross` moments too.

    Three phases follow one another: gate and up for the hidden width, the moments of what the solved pair makes, down
    for the inner width. Each of a phase's moments is a square matrix, and the factor of the Hessian one more. Rows on
    their way through a solve: the weights, the target, what remains of it, and copies of a block's levels, errors and
    sums, 7 rows in all; between the phases as many rows of both models go through gate and up.

    Where it is solved by both sides, the layer's matrix of gradients is there throughout, for gate and up what it is before
    down, and of each matrix its outputs' moments and their factor. All its rows are on their way at once, as the target,
    what remains of it, and three copies of that; slopes of some tokens in nine.
    """
    hidden = text.hidden_size
    moments = 2 if cross else 1
    levels = 3 * hidden * inner // 2  # int8, some twice while pieces are put together: half a float32 each
    first = (moments + 1) * hidden * hidden + 7 * rows * hidden
    between = 3 * hidden * inner + moments * inner * inner + rows * (7 * inner + 5 * hidden)
    last = (moments + 1) * inner * inner + 7 * rows * inner
    if two_sided:
        first += 3 * inner * inner + 5 * hidden * inner + 9 * rows * inner
        last += 2 * hidden * hidden + 5 * hidden * inner
        levels += hidden * hidden
    return (levels + max(first, between, last)) * FLOAT


def solving_attention(computing: Computing, *, cross: bool) -> int:
    """Bytes beside a layer's attention itself while GPTQ solves it: queries, keys and values for the hidden width, the
    moments of what goes into the output projection as attention runs, then that projection for those. Rows on their way
    are those of `solving`, or what rounding takes of a device; a block's inputs come of two models."""
    text = computing.text
    shapes = attention_shapes(text)
    hidden, heads = text.hidden_size, shapes[OUTPUT][1]
    numbers = _numbers(shapes.values())
    squares, row = (2 if cross else 1) + 1, 7 * FLOAT if computing.device == CPU else ROUNDED_ON_DEVICE
    levels = 2 * numbers  # int8, some twice while pieces are put together
    first = squares * hidden * hidden * FLOAT + computing.rows * hidden * row
    between = (numbers - hidden * heads + squares * heads * heads) * FLOAT + computing.attending()
    last = squares * heads * heads * FLOAT + computing.rows * heads * row
    return levels + max(first, between, last)


def solving_together(text: TextConfig, inner: int, together: int, *, cross: bool, two_sided: bool = False) -> int:
    """Bytes that MLPs solved `together` take beside their own weights and their stacked copies, float32.

    As for `solving`, but all output rows are solved at once, gate over up, and of all their tokens a few side by side. By both
    sides, gate, up and down are solved anew one after the other; what weighs outputs of down is there once.
    """
    hidden, pair = text.hidden_size, 2 * text.hidden_size * inner
    squares = 2 if cross else 1
    first = _solving_all_rows(2 * inner, hidden, cross=cross)
    tokens = TOGETHER_ROWS * (4 * hidden + 9 * inner)
    # The solved pair as levels, and as runtimes see it: float32 once it is rounded to 16 bits.
    between = pair // 4 + max(5 * pair // 2, pair + squares * inner * inner + tokens)
    last = pair // 4 + _solving_all_rows(hidden, inner, cross=cross)
    if not two_sided:
        return together * max(first, between, last) * FLOAT
    square, end = inner * inner, hidden * hidden  # what weighs outputs of gate, up and what is before down; and of down
    weighing = square + max(3 * square, square + tokens, 2 * square + _by_sides(inner, hidden))
    given = (squares + 1) * end + (pair if cross else 0) + 3 * pair // 8
    first = max(_solving_all_rows(2 * inner, hidden, cross=cross, aimed=True), given + weighing)
    given = (squares + 1) * square + (pair // 2 if cross else 0) + pair // 8
    solved = _solving_all_rows(hidden, inner, cross=cross, aimed=True)
    last = together * (pair // 4 + given + _by_sides(hidden, inner)) + 3 * end
    return (max(together * max(first, between, pair // 4 + solved), last) + end) * FLOAT


def _by_sides(outputs: int, inputs: int) -> int:
    """Numbers beside all that weights [outputs, inputs] solved by both sides are given: three copies of them on their way through
    losses, the nested solve and sweeps, with levels of two kinds; or fewer, and the tiles of a diagonal, or products of some
    columns; or scales as they are looked for."""
    weights, columns = outputs * inputs, min(PRODUCT_COLUMNS, inputs)
    scales = 3 * weights // 2 + 10 * min(SCALES_ROWS, outputs) * inputs
    beside = max(DIAGONAL * min(outputs, inputs), 3 * PRODUCT_COLUMNS * max(outputs, inputs))
    return max(scales, 7 * weights // 2, 5 * weights // 2 + beside, 3 * weights // 2 + 7 * columns * outputs)


def _solving_all_rows(outputs: int, inputs: int, *, cross: bool, aimed: bool = False) -> int:
    """Numbers beside the weights [outputs, inputs]: square matrices, and copies of the weights on their way; where they are
    `aimed`, what they aim at is there before scales are looked for."""
    squares, weights = (2 if cross else 1) * inputs * inputs, outputs * inputs
    factor = inputs * inputs
    inverse = squares + 3 * factor if cross and outputs > inputs else 0
    shift = squares + factor + 3 * weights if cross else 0
    scales = squares + factor + (5 if cross and aimed else 3) * weights // 2 + 10 * min(SCALES_ROWS, outputs) * inputs
    columns = squares + factor + 15 * weights // 4 + 7 * min(PRODUCT_COLUMNS, inputs) * outputs
    return max(squares + 2 * factor, inverse, shift, scales, columns)


def rounding(tasks: Sequence[Task], workers: int, *, accelerated: bool = False) -> Memory:
    """Of `workers` tasks at once, the largest ones: each a slab of the source and what is made of it."""
    ram = kernels_loaded(accelerated) + sum(heapq.nlargest(workers, (task.ram_bytes for task in tasks)))
    return Memory(ram, sum(heapq.nlargest(workers, _on_device(tasks))) if accelerated else 0)


def workers_within(tasks: Sequence[Task], wanted: int, most: Memory, *, accelerated: bool = False) -> int:
    """Most workers, of those wanted, that take no more than `most`."""
    fitting = _as_many((task.ram_bytes for task in tasks), wanted, most.ram - kernels_loaded(accelerated))
    return min(fitting, _as_many(_on_device(tasks), wanted, most.vram)) if accelerated else fitting


def kernels_loaded(accelerated: bool) -> int:
    """What rounding has resident before its first slab."""
    return KERNELS_LOADED + (CUDA_LOADED if accelerated else 0)


def check_room(needed: int, room: Room, what: str = "memory") -> None:
    """Raise BudgetError when a job needs more than there is."""
    if needed > room.nbytes:
        raise BudgetError(
            f"the job needs {human_bytes(needed)} of {what}, the limit is {human_bytes(room.nbytes)} ({room.limit})",
            hint=room.remedy,
        )


def walk_within(
    computing: Computing, needed: Callable[[Computing], Memory], ram: Room, device: Room | None = None
) -> tuple[Memory, bool]:
    """What a walk needs, and whether its next unit is loaded while one computes: not where that is too much.

    Raises BudgetError when it needs more than there is even so, of the machine's memory or the device's.
    """
    for ahead in (True, False):
        memory = needed(replace(computing, ahead=ahead))
        if fits(memory, ram, device):
            return memory, ahead
    for nbytes, room in ((memory.ram, ram), (memory.vram, device)):
        if room is not None and nbytes > room.nbytes:
            raise BudgetError(
                f"running this model layer by layer takes at least {human_bytes(nbytes)}, "
                f"{human_bytes(room.nbytes)} are there ({room.limit})",
                hint=f"one expert's matrices must fit; {room.remedy}",
            )
    raise AssertionError("what does not fit is too much for one of the two")


def fits(needed: Memory, ram: Room, device: Room | None = None) -> bool:
    """Whether there is what a job needs, of the machine's memory and the device's (None: not asked)."""
    return needed.ram <= ram.nbytes and (device is None or needed.vram <= device.nbytes)


def _largest_matrix(text: TextConfig) -> int:
    """Weights of one matrix of the largest MLP."""
    return text.hidden_size * widest_mlp(text)


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _on_device(tasks: Sequence[Task]) -> list[int]:
    """Device memory of every task that quantizes."""
    quantizing = (task for task in tasks if task.action is Action.QUANTIZE)
    return [
        ROUNDED_ON_DEVICE * (task.rows[1] - task.rows[0]) * task.targets[0].linear.in_features for task in quantizing
    ]


def _as_many(sizes: Iterable[int], wanted: int, most: int) -> int:
    """How many of the largest, up to those wanted, `most` bytes hold; all wanted where there are fewer and they fit."""
    held = list(itertools.accumulate(heapq.nlargest(wanted, sizes)))
    fitting = sum(nbytes <= most for nbytes in held)
    return wanted if fitting == len(held) else fitting
