"""Where the files come from that a licence asks for: the source of an artifact, or its repository. Never made up."""

from __future__ import annotations

from dataclasses import dataclass, field

from l4pack.artifact.policy import Duty
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import LicenceError, SourceError

MAX_SMALL_FILE = 2_000_000


@dataclass(frozen=True)
class Origin:
    """Where licence files come from: the source that was given, else a repository at a revision."""

    source: Checkpoint | None
    repository: str | None = None
    revision: str | None = None
    endpoint: str | None = field(default=None, repr=False)

    @property
    def named(self) -> str:
        """The origin in words."""
        return self.source.name if self.source else self.repository or "the source (no repository is known)"

    def text(self, name: str) -> str | None:
        """A small text file of it, None when it has none. Raises HubError."""
        if self.source is not None:
            return source_text(self.source, name)
        return self.repository and _repository_text(self.repository, self.revision, name, self.endpoint)


def taken(duty: Duty, origin: Origin) -> tuple[str, str]:
    """Name and text of a file the source must have; what it holds is checked before it is taken. Raises LicenceError."""
    for name in duty.files or []:
        text = origin.text(name)
        if text is not None and duty.satisfied_by(text):
            return name, text
    raise LicenceError(
        f"{duty.files[0] if duty.files else duty.rule} is missing, and {origin.named} has none that serves: {duty.cited}",
        hint="put the file that came with the original model into the folder, or say --source",
    )


def source_text(source: Checkpoint, name: str) -> str | None:
    """A small text file of a source, None when it has none."""
    if source.store is None:
        return None
    try:
        path = source.store.path(name)
    except SourceError:
        return None
    if not path.is_file() or path.stat().st_size > MAX_SMALL_FILE:
        return None
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _repository_text(repository: str, revision: str | None, name: str, endpoint: str | None) -> str | None:
    from l4pack.checkpoint.hub import open_remote
    from l4pack.hub.client import hub_api, hub_errors

    api = hub_api(endpoint, None)
    with hub_errors(api, repository, revision):
        remote = open_remote(api, repository, revision)
        file = remote.files.get(name)
        fits = file is not None and file.size <= MAX_SMALL_FILE
        return remote.small(name, MAX_SMALL_FILE).decode(errors="replace") if fits else None
