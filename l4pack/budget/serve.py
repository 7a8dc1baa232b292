"""The command that starts a server within a budget: every part of the load that is not the runtime's own choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from l4pack.budget.files import FileSubject
from l4pack.budget.load import longest_context
from l4pack.budget.model import Budget
from l4pack.budget.runtimes import ServeOptions

LINE = 72
DEFAULT_UBATCH = 512


def serve_command(found: Budget, model: str) -> str | None:
    """A line for a shell that serves `model`, a folder or `ORG/NAME`, as the budget was made for.

    None when it does not fit at both ends, or the runtime has no server.
    """
    if isinstance(found.subject, FileSubject):
        return shlex.join(_local(found, found.subject)) if found.fits else None
    options = found.runtime.serve
    if options is None or not found.fits:
        return None
    return shlex.join([*options.command, model, *_always(found, options), *_where_asked(found, options)])


def _local(found: Budget, subject: FileSubject) -> Iterator[str]:
    """llama.cpp's or MLX's own server; llama.cpp's context is that of all its slots."""
    setting = found.setting
    if found.runtime.kv == "mlx":
        yield from ("mlx_lm.server", "--model", str(subject.path))
        return
    yield from ("llama-server", "--model", str(subject.path))
    if subject.tower is not None:
        yield from ("--mmproj", str(subject.tower))
    yield from ("--ctx-size", str(setting.context * setting.sequences), "--parallel", str(setting.sequences))
    yield from ("--gpu-layers", str(setting.gpu_layers if setting.gpu_layers is not None else _all_layers(found)))
    if setting.batched_tokens != DEFAULT_UBATCH:
        yield from ("--ubatch-size", str(setting.batched_tokens))
    if setting.kv_dtype == "q8_0":
        yield from ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0")


def _all_layers(found: Budget) -> int:
    """Every layer and the head."""
    return found.subject.config.text.num_hidden_layers + 1


def on_lines(command: str) -> str:
    """The same command, an option or a few on each line, as a shell still takes it."""
    lines = [""]
    for part in command.split(" --"):
        piece = f"--{part}" if lines[0] else part
        if len(lines[-1]) + len(piece) < LINE or not lines[0]:
            lines[-1] = f"{lines[-1]} {piece}".strip()
        else:
            lines.append(piece)
    return " \\\n  ".join(lines)


def _always(found: Budget, options: ServeOptions) -> Iterator[str]:
    """What a server's memory hangs on, said even where it is the default: defaults change between versions."""
    setting = found.setting
    yield from (options.context, str(setting.context))
    yield from (options.max_num_seqs, str(setting.max_num_seqs))
    yield from (options.tp, str(setting.tp))
    if setting.kv_dtype == "fp8":
        yield from options.kv_dtype


def _where_asked(found: Budget, options: ServeOptions) -> Iterator[str]:
    setting, config, runtime = found.setting, found.subject.config, found.runtime
    defaults = runtime.defaults(found.host.device)
    if setting.pp > 1:
        yield from (options.pp, str(setting.pp))
    if defaults is not None and setting.batched_tokens != defaults.batched_tokens:
        yield from (options.batched_tokens, str(setting.batched_tokens))
    if setting.utilization != runtime.fraction(found.host.device, setting.gpus, config.vision):
        yield from (options.utilization, f"{setting.utilization:g}")
    if setting.expert_parallel:
        yield from options.expert_parallel
    if runtime.hybrid and not setting.hybrid:
        yield from options.no_hybrid
    if setting.images is not None and options.images:
        yield from (options.images, json.dumps({"image": setting.images}))
    if setting.max_positions < longest_context(config.text):
        positions = {"max_position_embeddings": setting.max_positions}
        yield from (options.overrides, json.dumps({"text_config": positions} if config.vision else positions))
