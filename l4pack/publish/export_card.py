"""What the card of an export says that an artifact's does not: its runtime's commands, its files, what they hold."""

from __future__ import annotations

import shlex
from typing import Any

from l4pack.budget.serve import on_lines
from l4pack.publish.card_facts import CardFacts, ExportFacts
from l4pack.publish.markdown import safe, word
from l4pack.units import human_bytes

_GGUF, _CONTEXT = "gguf", 8192
_TITLES = {_GGUF: "GGUF", "mlx": "MLX"}
_CLIENTS = {_GGUF: "llama.cpp", "mlx": "mlx-lm"}
_PROMPT = "Why is the sky blue?"


def libraries(export: ExportFacts) -> tuple[str, ...]:
    """What the Hub calls the library that loads it, and the tags that people look for."""
    return (_GGUF, _GGUF, "llama.cpp") if export.container == _GGUF else ("mlx", "mlx", "mlx-lm")


def suffixed(name: str, container: str) -> str:
    """The name of an export of an artifact of that name."""
    return f"{name}-{_TITLES[container]}"


def export_values(facts: CardFacts, export: ExportFacts) -> dict[str, Any]:
    """What a template may use of an export."""
    return {
        "title": _TITLES[export.container],
        "client": _CLIENTS[export.container],
        "container": export.container,
        "artifact": word(export.artifact),
        "proved_by": safe(export.proved_by),
        "rounded": [tuple(map(safe, one)) for one in export.rounded],
        "files": [(word(name), human_bytes(size)) for name, size in sorted(facts.files.items())],
        "tower": export.tower is not None,
        "text_alone": export.text_alone,
        "parts": "-of-" in export.model,
        "memory": [(device, f"{most:,}" if most else "too large") for device, most in export.memory],
    }


def export_commands(where: str, name: str, export: ExportFacts) -> dict[str, str]:
    """Commands for a shell that load it: `where` is `ORG/NAME`."""
    again = shlex.join(["l4pack", "export", word(export.artifact), "--to", export.container, "--out", name])
    if export.container != _GGUF:
        return {
            "generate": f"mlx_lm.generate --model {where} --max-tokens 256 --prompt {shlex.quote(_PROMPT)}",
            "server": f"mlx_lm.server --model {where}",
            "export": again,
        }
    model = f"{name}/{word(export.model)}"
    tower = [] if export.tower is None else ["--mmproj", f"{name}/{word(export.tower)}"]
    serve = ["llama-server", "--model", model]
    context = str(min(_CONTEXT, export.context))
    return {
        "download": f"hf download {where} --local-dir {name}",
        "server": on_lines(shlex.join([*serve, *tower, "--ctx-size", context, "--gpu-layers", "99"])),
        "merge": shlex.join(["llama-gguf-split", "--merge", model, f"{name}.gguf"]),
        "ollama": f"ollama run hf.co/{where}",
        "studio": f"lms get https://huggingface.co/{where}",
        "export": again,
    }
