"""The load a budget is asked for: context, sequences, parallelism and the runtime's own limits."""

from __future__ import annotations

from dataclasses import dataclass

from l4pack.budget.devices import Host
from l4pack.budget.runtimes import Runtime
from l4pack.budget.subject import Subject
from l4pack.errors import UsageError
from l4pack.model.config import TextConfig

KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "float16": 2.0, "q8_0": 34 / 32}
KV_ALIASES = {"bf16": "bfloat16", "fp8_e4m3": "fp8", "f16": "float16"}
DEFAULT_CONTEXT = 131072
MAX_SEQUENCES = 1_000_000
MAX_CONTEXT = 2**34  # beyond any model: a configuration's own figure is believed up to here


@dataclass(frozen=True)
class Load:
    """What a user asks for; None means the runtime's own choice."""

    context: int | None = None
    sequences: int = 1
    kv_dtype: str = "auto"
    tp: int | None = None
    pp: int | None = None
    expert_parallel: bool = False
    hybrid: bool | None = None
    batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_positions: int | None = None
    images: int | None = None
    utilization: float | None = None
    gpu_layers: int | None = None


@dataclass(frozen=True)
class Setting:
    """A load with every choice made; what the memory model computes from."""

    context: int
    sequences: int
    kv_dtype: str
    tp: int
    pp: int
    expert_parallel: bool
    hybrid: bool
    batched_tokens: int
    chunked_prefill: bool
    max_num_seqs: int
    max_positions: int
    images: int | None
    utilization: float
    sequence_limit: int
    idle_gpus: int = 0
    gpu_layers: int | None = None  # layers that are not in the machine's own memory; None: all

    @property
    def gpus(self) -> int:
        """GPUs that one copy of the model takes."""
        return self.tp * self.pp

    @property
    def step_tokens(self) -> int:
        """Most tokens of one forward pass: a batch, or whole prompts where the runtime does not cut them."""
        return self.batched_tokens if self.chunked_prefill else self.context * self.sequences

    @property
    def kv_bytes(self) -> float:
        """Bytes of one KV element."""
        return KV_BYTES[self.kv_dtype]

    @property
    def requests(self) -> int:
        """Requests the runtime makes room for in its tables and its sampler."""
        return max(self.max_num_seqs, self.sequences)


def resolve(subject: Subject, host: Host, runtime: Runtime, load: Load) -> Setting:
    """Fill in what the runtime would choose, and refuse what it would refuse. Raises UsageError."""
    text = subject.config.text
    _check_counts(load)
    tp, pp = _parallel(text, host, runtime, load)
    defaults = runtime.defaults(host.device)
    setting = Setting(
        context=_context(text, load),
        sequences=load.sequences,
        kv_dtype=_kv_dtype(subject, runtime, load.kv_dtype),
        tp=tp,
        pp=pp,
        expert_parallel=load.expert_parallel,
        hybrid=runtime.hybrid if load.hybrid is None else load.hybrid,
        batched_tokens=load.batched_tokens or (defaults.batched_tokens if defaults else 0),
        chunked_prefill=runtime.chunked_prefill,
        max_num_seqs=load.max_num_seqs or (defaults.max_num_seqs if defaults else load.sequences),
        max_positions=load.max_positions or longest_context(text),
        images=load.images,
        utilization=_utilization(subject, host, runtime, load, tp * pp),
        sequence_limit=load.max_num_seqs or MAX_SEQUENCES,
        idle_gpus=host.count - tp * pp,
        gpu_layers=_gpu_layers(runtime, load),
    )
    _check_limits(setting, load)
    return setting


def longest_context(text: TextConfig) -> int:
    """Tokens of the model's whole context."""
    return min(text.max_position_embeddings, MAX_CONTEXT)


def _check_counts(load: Load) -> None:
    for name in ("sequences", "tp", "pp", "batched_tokens", "max_num_seqs", "max_positions"):
        value = getattr(load, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', '-')} {value} is not positive", hint="give 1 or more")
    if load.images is not None and load.images < 0:
        raise UsageError(f"images {load.images} is negative", hint="0 means text only")


def _parallel(text: TextConfig, host: Host, runtime: Runtime, load: Load) -> tuple[int, int]:
    if runtime.pipeline:
        if (load.tp or 1) != 1:
            raise UsageError(f"{runtime.title} does not split tensors", hint="leave --tp out")
        tp, pp = 1, load.pp or host.count
    else:
        pp = load.pp or 1
        tp = load.tp or degrees(text, max(host.count // pp, 1))[-1]
    if tp * pp > host.count:
        raise UsageError(f"tp {tp} x pp {pp} needs {tp * pp} GPUs, {host.name} has {host.count}", hint="lower one")
    if pp > text.num_hidden_layers:
        raise UsageError(f"pp {pp} is more than the model's {text.num_hidden_layers} layers", hint="lower --pp")
    if not divides(text, tp):
        raise UsageError(
            f"tp {tp} does not divide {text.num_attention_heads} attention heads and {text.num_key_value_heads} KV heads",
            hint=f"tp may be {', '.join(map(str, degrees(text, host.count)))}",
        )
    return tp, pp


def divides(text: TextConfig, tp: int) -> bool:
    """Whether attention can be split `tp` ways: whole query heads, and KV heads split or repeated (vLLM `llama4.py`)."""
    heads, keys = text.num_attention_heads, text.num_key_value_heads
    return heads % tp == 0 and (keys % tp == 0 or tp % keys == 0)


def degrees(text: TextConfig, most: int) -> list[int]:
    """The tensor parallel degrees up to `most` that attention can be split into, least first."""
    return [tp for tp in range(1, most + 1) if divides(text, tp)]


def _context(text: TextConfig, load: Load) -> int:
    longest = longest_context(text)
    context = min(DEFAULT_CONTEXT, longest) if load.context is None else load.context
    if context < 1:
        raise UsageError(f"context {context} is not positive", hint="give a number of tokens")
    if context > longest:
        raise UsageError(
            f"context {context:,} is beyond the model's {longest:,} tokens", hint=f"ask for {longest} or less"
        )
    return context


def _kv_dtype(subject: Subject, runtime: Runtime, name: str) -> str:
    if name == "auto":
        return subject.kv_dtype
    dtype = KV_ALIASES.get(name, name)
    if dtype not in KV_BYTES:
        raise UsageError(f"no KV dtype is named '{name}'", hint="use auto, bfloat16 or fp8; llama.cpp's: float16, q8_0")
    if dtype not in runtime.kv_dtypes:
        raise UsageError(f"{runtime.title} keeps no {dtype} KV", hint=f"use auto, {' or '.join(runtime.kv_dtypes)}")
    return dtype


def _gpu_layers(runtime: Runtime, load: Load) -> int | None:
    if load.gpu_layers is not None and runtime.kv != "llama.cpp":
        raise UsageError(f"{runtime.title} keeps all layers on the device", hint="--gpu-layers goes with a GGUF file")
    if load.gpu_layers is not None and load.gpu_layers < 0:
        raise UsageError(f"gpu-layers {load.gpu_layers} is negative", hint="0 keeps all in the machine's own memory")
    return load.gpu_layers


def _utilization(subject: Subject, host: Host, runtime: Runtime, load: Load, gpus: int) -> float:
    if load.utilization is None:
        return runtime.fraction(host.device, gpus, subject.config.vision)
    if not 0 < load.utilization <= 1:
        raise UsageError(f"utilization {load.utilization} is not in (0, 1]", hint="for example 0.92")
    return load.utilization


def _check_limits(setting: Setting, load: Load) -> None:
    if setting.sequences > MAX_SEQUENCES:
        raise UsageError(f"{setting.sequences:,} sequences is more than any server", hint=f"at most {MAX_SEQUENCES:,}")
    if load.max_num_seqs is not None and setting.sequences > load.max_num_seqs:
        raise UsageError(
            f"{setting.sequences} sequences are more than max-num-seqs {load.max_num_seqs}", hint="raise --max-num-seqs"
        )
    if setting.max_positions < setting.context:
        raise UsageError(
            f"max-positions {setting.max_positions:,} is less than the context", hint="give at least the context"
        )
