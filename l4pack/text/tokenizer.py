"""A checkpoint's own tokenizer, and its chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.companions import TEMPLATE_FOLDER
from l4pack.checkpoint.source import Checkpoint
from l4pack.checkpoint.templates import legacy_template
from l4pack.errors import L4packError, SourceError, UsageError
from l4pack.text.layouts import Chat
from l4pack.work.patience import quiet_stderr, within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer's patterns and a chat template are programs: those of a hostile checkpoint may never end. The slowest real
# ones do a megabyte in a few seconds.
PATIENCE_SECONDS, BYTES_A_SECOND = 30.0, 50_000
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "added_tokens", TEMPLATE_FOLDER)
_SHOWN = 160


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; nothing is downloaded beyond its files. Raises SourceError."""
    names = [name for name in checkpoint.companions if name.startswith(_TOKENIZER_FILES)]
    if checkpoint.store is None or "tokenizer.json" not in names:
        raise SourceError(
            f"{checkpoint.name} has no tokenizer.json",
            hint="download the tokenizer's files into the folder, or say with --companions where they are",
        )
    paths = {name: checkpoint.store.path(name) for name in names}
    from transformers import PreTrainedTokenizerFast

    folder = paths["tokenizer.json"].parent
    try:
        tokenizer = _bounded(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), checkpoint.name)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise SourceError(
            f"{checkpoint.name}: tokenizer.json can't be read ({first_line(error)})", hint="download it again"
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


def first_line(error: Exception) -> str:
    """An error of another library, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN] if lines else type(error).__name__


class Template:
    """Conversations as the model reads them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = _chosen(tokenizer.chat_template)

    @property
    def there(self) -> bool:
        """Whether there is one."""
        return self._template is not None

    def render(self, chat: Chat, where: str, *, reply: bool = False) -> str:
        """A conversation's text, with `reply` up to where the model's answer begins. Raises UsageError where there is no template, or it refuses the conversation."""
        if self._template is None:
            raise UsageError(
                f"{where}: a conversation, and the tokenizer has no chat template",
                hint="put the model's chat_template.jinja beside its tokenizer.json, or take plain text",
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=reply,
                )
            )
        except L4packError:
            raise
        except Exception as error:  # a template is a program of its own: whatever it raises is about this row
            raise UsageError(
                f"{where}: the chat template refuses it ({first_line(error)})",
                hint="each message needs a role and a content the template knows",
            ) from error


def _chosen(template: Any) -> str | None:
    """Of several templates the one called default, or the only one; without a byte order mark."""
    if isinstance(template, dict):
        named = list(template.values())
        template = template.get("default", named[0] if len(named) == 1 else None)
    return template.lstrip("\ufeff") if isinstance(template, str) and template.strip() else None
