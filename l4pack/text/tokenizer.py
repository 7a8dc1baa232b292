"""A checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.companions import TEMPLATE_FOLDER
from l4pack.checkpoint.source import Checkpoint
from l4pack.checkpoint.templates import legacy_template
from l4pack.errors import SourceError
from l4pack.work.patience import quiet_stderr, within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer's patterns and a chat template are programs: those of a hostile checkpoint may never end. The slowest real
# ones do a megabyte in a few seconds.
PATIENCE_SECONDS, BYTES_A_SECOND = 30.0, 50_000
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "added_tokens", TEMPLATE_FOLDER)


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
        tokenizer = _bounded(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), checkpoint.name)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{checkpoint.name}: tokenizer.json can't be read ({reason})", hint="download it again"
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = legacy_template(checkpoint)
    return tokenizer


def _bounded(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a time limit on what it does to a text."""

    def bounded(call: Callable[..., Any], file: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            size = len(str(args[0] if args else kwargs.get("text", kwargs.get("conversation", ""))))
            try:
                with quiet_stderr():
                    return within(PATIENCE_SECONDS + size / BYTES_A_SECOND, lambda: call(*args, **kwargs))
            except BaseException as error:
                if not isinstance(error, TimeoutError) and type(error).__name__ != "PanicException":
                    raise
                raise SourceError(
                    f"{name}: {file} finds no end on {size:,} characters of text", hint="download it again"
                ) from error

        return run

    tokenizer._encode_plus = bounded(tokenizer._encode_plus, "tokenizer.json")
    tokenizer.apply_chat_template = bounded(tokenizer.apply_chat_template, "its chat template")
    return tokenizer
