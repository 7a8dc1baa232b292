"""Whether the adapters merged into an original are those that an artifact was made with."""

from __future__ import annotations

from l4pack.artifact.manifest_schema import AdapterRecord, SourceRecord
from l4pack.checkpoint.source import Checkpoint


def other_adapters(name: str, source: SourceRecord, original: Checkpoint) -> tuple[str, str] | None:
    """What is wrong, and what to do, where the adapters merged into the original are not those of the artifact `name`."""
    recorded, given = [one.sha256 for one in source.adapters], [one.sha256 for one in original.adapters]
    if given == recorded:
        return None
    made = f"{name} was made with {', '.join(map(_called, source.adapters)) or 'no adapter'} merged into its source"
    options = " ".join(f"--lora {_called(one)}" for one in source.adapters)
    if not given:
        return made, f"add {options}"
    titles = ", ".join(adapter.title for adapter in original.adapters)
    return f"{made}, and not with {titles} as given here", f"give {options}" if options else "leave --lora out"


def _called(adapter: AdapterRecord) -> str:
    return adapter.repository or adapter.name
