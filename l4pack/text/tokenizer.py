"""A checkpoint's own tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "added_tokens")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; nothing is downloaded beyond its files. Raises SourceError."""
    names = [name for name in checkpoint.companions if name.startswith(_TOKENIZER_FILES)]
    if checkpoint.store is None or "tokenizer.json" not in names:
        raise SourceError(
            f"{checkpoint.name} has no tokenizer.json", hint="download the tokenizer's files into the folder"
        )
    paths = {name: checkpoint.store.path(name) for name in names}
    from transformers import PreTrainedTokenizerFast

    folder = paths["tokenizer.json"].parent
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{checkpoint.name}: tokenizer.json can't be read ({reason})", hint="download it again"
        ) from error
