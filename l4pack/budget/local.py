"""Memory of llama.cpp and mlx-lm, line by line: weights as stored, KV with chunked layers as each keeps them, buffers.

llama.cpp puts the last N of the layers and the head on the devices (`--gpu-layers`, `llama-model.cpp`), divided evenly, and
the token embedding into the machine's memory always; where memory is unified, both are one. A layer with chunked attention
keeps a chunk and a batch in steps of 256 (`llama-kv-cache-iswa.cpp`). mlx-lm's `ChunkedKVCache` forgets between
steps of a prompt, so it holds a chunk and a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from l4pack.budget.devices import Host
from l4pack.budget.files import FileSubject, Stored
from l4pack.budget.kv import layer_kinds, token_bytes
from l4pack.budget.lines import WEIGHT_LINES, Line, LineGroup, Stage
from l4pack.budget.load import Setting
from l4pack.budget.runtimes import Runtime
from l4pack.errors import UsageError
from l4pack.model.config import TextConfig
from l4pack.model.tensors import Role
from l4pack.units import MIB

STEP = 256  # tokens that both runtimes let a cache grow by
TOWER_BUFFER = 300 * MIB  # of the vision tower's graph, at most
_FLOAT, _HALF = 4, 2
_MACHINE = None


def local_lines(
    subject: FileSubject, host: Host, runtime: Runtime, setting: Setting
) -> tuple[tuple[Stage, ...], tuple[Line, ...]]:
    """The devices' lines, and those of the machine's own memory. Raises UsageError for several devices of mlx-lm."""
    if runtime.kv == "mlx":
        if host.count > 1:
            raise UsageError("mlx-lm runs on one device here", hint="name one, as m3-ultra-512")
        lines = (*_weights(subject.stored), *_mlx_cache(subject, setting), _mlx_buffers(subject.config.text, setting))
        return (_stage(0, (*lines, _context(runtime)), host, setting),), ()
    place = _places(subject, host, setting)
    stages = tuple(
        _stage(index, (*_on(subject, setting, place, index), _context(runtime)), host, setting)
        for index in range(host.count)
    )
    return stages, () if host.device.unified else tuple(
        line for line in _on(subject, setting, place, _MACHINE) if line.high
    )


def device_layers(subject: FileSubject, host: Host, setting: Setting) -> list[set[int]]:
    """The layers that each device has the matrices of."""
    layers = range(subject.config.text.num_hidden_layers)
    place = _places(subject, host, setting)
    return [{layer for layer in layers if place(layer, Role.ATTENTION) == index} for index in range(host.count)]


Place = Callable[[int | None, Role], int | None]


def _places(subject: FileSubject, host: Host, setting: Setting) -> Place:
    """Which device, or the machine (None), has a tensor of a layer and role; the head counts as the layer after the last."""
    layers = subject.config.text.num_hidden_layers
    wanted = layers + 1 if setting.gpu_layers is None or host.device.unified else min(setting.gpu_layers, layers + 1)
    first = layers + 1 - wanted

    def place(layer: int | None, role: Role) -> int | None:
        if role in (Role.VISION, Role.PROJECTOR):
            return 0
        if role is Role.EMBEDDING:
            return 0 if host.device.unified else _MACHINE
        number = layers if layer is None else layer
        return _MACHINE if number < first else host.count * (number - first) // wanted

    return place


def _on(subject: FileSubject, setting: Setting, place: Place, device: int | None) -> list[Line]:
    """The lines of one device, or of the machine."""
    text = subject.config.text
    there = [one for one in subject.stored if place(one.layer, one.role) == device]
    if text.tie_word_embeddings and place(None, Role.LM_HEAD) == device != place(None, Role.EMBEDDING):
        there += [one for one in subject.stored if one.role is Role.EMBEDDING]
    full, chunked = layer_kinds(text, setting.hybrid)
    kept = [[layer for layer in kind if place(layer, Role.ATTENTION) == device] for kind in (full, chunked)]
    lines = [*_weights(there), *_ggml_cache(text, setting, *kept)]
    if any(kept) or place(None, Role.LM_HEAD) == device:
        lines.append(_ggml_buffers(text, setting, head=place(None, Role.LM_HEAD) == device))
    if device == 0 and subject.tower is not None:
        lines.append(Line("image buffers", LineGroup.ACTIVATIONS, 0, TOWER_BUFFER, "the vision tower's graph"))
    return lines


def _weights(stored: Iterable[Stored]) -> list[Line]:
    totals: dict[Role, int] = defaultdict(int)
    for tensor in stored:
        totals[tensor.role] += tensor.nbytes
    sizes = [(name, sum(totals[role] for role in roles)) for name, roles, _ in WEIGHT_LINES]
    return [Line(name, LineGroup.WEIGHTS, size, size, "as stored") for name, size in sizes if size]


def _ggml_cache(text: TextConfig, setting: Setting, full: list[int], chunked: list[int]) -> list[Line]:
    return [
        _cache("KV cache, whole", text, setting, len(full), _padded(setting.context)),
        _cache("KV cache, chunks", text, setting, len(chunked), _window(text, setting)),
    ]


def _window(text: TextConfig, setting: Setting) -> int:
    """Tokens that a layer with chunks keeps: a chunk and the batch that is being read."""
    context = _padded(setting.context)
    return min(context, _padded((text.attention_chunk_size or context) + setting.batched_tokens))


def _mlx_cache(subject: FileSubject, setting: Setting) -> list[Line]:
    text = subject.config.text
    full, chunked = layer_kinds(text, setting.hybrid)
    context = _padded(setting.context)
    copied = context * token_bytes(text, setting)
    return [
        _cache("KV cache, whole", text, setting, len(full), context),
        _cache("KV cache, chunks", text, setting, len(chunked), _window(text, setting)),
        Line("KV cache, growing", LineGroup.KV_CACHE, 0, copied, "a layer's is copied when it grows"),
    ]


def _cache(name: str, text: TextConfig, setting: Setting, layers: int, tokens: int) -> Line:
    size = setting.sequences * layers * tokens * token_bytes(text, setting)
    return Line(name, LineGroup.KV_CACHE, size, size, f"{setting.sequences:,} x {layers} layers x {tokens:,} tokens")


def _ggml_buffers(text: TextConfig, setting: Setting, *, head: bool) -> Line:
    """The graph's buffer: logits of a whole batch where the head is, else a layer's; and the masks of attention."""
    batch = min(setting.batched_tokens, _padded(setting.context))
    layer = batch * _layer_width(text) * _FLOAT
    logits = batch * (text.vocab_size + text.hidden_size) * _FLOAT if head else 0
    masks = batch * (_padded(setting.context) + _window(text, setting))
    low = max(layer // 2, logits) + masks * _HALF
    high = max(layer, logits) + 4 * batch * text.hidden_size * _FLOAT + masks * (_FLOAT + _HALF)
    what = "logits" if head else "a layer"
    return Line(
        "compute buffer", LineGroup.ACTIVATIONS, low, high, f"{batch:,} tokens a batch: {what}, masks; flash attention"
    )


def _mlx_buffers(text: TextConfig, setting: Setting) -> Line:
    batch = min(setting.batched_tokens, _padded(setting.context))
    low = batch * _layer_width(text) * _HALF
    high = 3 * low + 2 * batch * _padded(setting.context) + text.vocab_size * _FLOAT
    return Line(
        "compute buffers", LineGroup.ACTIVATIONS, low, high, f"{batch:,} tokens a step, and buffers kept for reuse"
    )


def _layer_width(text: TextConfig) -> int:
    """Numbers a token has at a layer's widest: its states, and queries, keys and values or an MLP's insides."""
    attention = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    experts = 3 * text.intermediate_size * (text.num_experts_per_tok + 1)
    dense = 3 * text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 0
    return 3 * text.hidden_size + max(attention, experts, dense)


def _context(runtime: Runtime) -> Line:
    return Line("device context", LineGroup.RUNTIME, *runtime.context, "a range: no runtime publishes it")


def _stage(index: int, lines: tuple[Line, ...], host: Host, setting: Setting) -> Stage:
    memory = host.device.memory_bytes
    planned = -int(-memory * setting.utilization // 1)
    return Stage(index, tuple(line for line in lines if line.high), planned, memory - planned)


def _padded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
