"""Opening whatever a user names as a source."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from l4pack.checkpoint.source import HUB_ID, Checkpoint, open_bare, open_folder
from l4pack.errors import SourceError
from l4pack.model.config import KNOWN_MODELS

DEMO = "demo"
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def open_source(text: str, *, fetch_folder: Path | None = None) -> Checkpoint:
    """Open a folder, `ORG/NAME[@REVISION]` on the Hub, a `config.json`, a known model's name, or `demo`.

    With `fetch_folder`, a Hub source's shards are fetched there one by one and dropped after use.
    Raises SourceError or HubError.
    """
    try:
        Path(text).stat()
    except OSError as error:
        if error.errno not in _ABSENT:
            raise SourceError(f"{text}: {error.strerror}", hint="give a folder that can be read") from error
    bare = open_bare(text)
    if bare is not None:
        return bare
    if text == DEMO and not Path(text).exists():
        from l4pack.demo import model_path

        return replace(open_folder(model_path()), name=DEMO)
    if Path(text).exists():
        return open_folder(Path(text))
    match = HUB_ID.fullmatch(text)
    if match is None:
        raise SourceError(
            f"{text} is neither a folder nor ORG/NAME of a Hub repository",
            hint=f"known by name: {', '.join(KNOWN_MODELS)}, {DEMO}",
        )
    from l4pack.checkpoint.hub import open_hub

    return open_hub(match[1], match[2], fetch_as_you_go=fetch_folder is not None, folder=fetch_folder)
