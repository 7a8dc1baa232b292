"""The command that starts a server within a budget: every part of the load that is not the runtime's own choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from l4pack.budget.load import longest_context
from l4pack.budget.model import Budget
from l4pack.budget.runtimes import ServeOptions

LINE = 72


def serve_command(found: Budget, model: str) -> str | None:
    """A line for a shell that serves `model`, a folder or `ORG/NAME`, as the budget was made for.

    None when it does not fit at both ends, or the runtime has no server.
    """
    options = found.runtime.serve
    if options is None or not found.fits:
        return None
    return shlex.join([*options.command, model, *_always(found, options), *_where_asked(found, options)])


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
