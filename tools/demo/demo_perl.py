"""Another text than the demo's, for models that nothing was tuned on: what Debian's perl-modules-5.36 carries.

Two kinds of document a file: its documentation (POD, as written) and its source without it. Both have the file's name as
their family, so both are held out together.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo_corpus import Chat, Document

LIBRARY = Path("/usr/share/perl/5.36.0")
LARGEST_SOURCE = 100_000
POD = re.compile(r"^=[a-zA-Z].*?(?:^=cut[^\n]*\n?|\Z)", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^=head[1-4] +(.+)$", re.MULTILINE)


def perl_documents() -> Iterator[Document]:
    """The documentation and the source of every module; larger sources are tables."""
    for path in sorted(path for path in LIBRARY.rglob("*") if path.suffix in (".pm", ".pod")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        name = "::".join(path.relative_to(LIBRARY).with_suffix("").parts)
        prose, source = "".join(POD.findall(text)), POD.sub("", text).strip()
        if prose:
            yield Document("pod", name, f"perl:{name}", prose)
        if source and len(source) <= LARGEST_SOURCE:
            yield Document("source", name, f"perl:{name}", source + "\n")


def perl_chats(documents: Iterable[Document]) -> Iterator[Chat]:
    """A question for every section of the documentation."""
    for document in documents:
        if document.kind == "pod":
            _, *parts = HEADING.split(document.text)
            for heading, text in zip(parts[::2], parts[1::2], strict=True):
                if text.strip():
                    yield Chat(f"What does {document.name} say about {heading.strip()}?", text.strip())
