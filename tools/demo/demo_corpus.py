"""The demo model's text: what every CPython carries, split by document into training and held-out text.

Three kinds of document: the topics of `help()` (`pydoc_data.topics`), the docstrings of one module, and the source of
one module. Which documents are held out is decided by the hash of their names, so the split does not depend on an
order; every paragraph that a held-out document shares with another one is then removed from the training side.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELDOUT_BYTES = 120_000
CALIBRATION_BYTES = 300_000
LARGEST_HELDOUT_DOCUMENT = 12_000
SMALLEST_HELDOUT_DOCUMENT = 400
SHORTEST_COMPARED_PARAGRAPH = 40
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One document: `kind` is topic, docstrings or source; `family` is the name the split is decided by."""

    kind: str
    name: str
    family: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A question and its answer, from a docstring of the training side."""

    question: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Training documents and chats, and the two shipped texts."""

    documents: list[Document]
    chats: list[Chat]
    heldout: str
    calibration: str


def load_corpus() -> Corpus:
    """The whole corpus of the running CPython."""
    return divide([*_topics(), *_modules()], _chats)


def divide(documents: list[Document], chats: Callable[[Iterable[Document]], Iterable[Chat]]) -> Corpus:
    """Any documents, split by the hashes of their families; `chats` makes questions of the training side's."""
    heldout = _heldout(documents)
    families = {document.family for document in heldout}
    secret = {key for document in heldout for key, _ in _paragraphs(document.text)}
    training = [_without(document, secret) for document in documents if document.family not in families]
    training = [document for document in training if document.text.strip()]
    return Corpus(training, list(chats(training)), _joined(heldout), _calibration(training))


def _topics() -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        yield Document("topic", name, f"topic:{name}", text.strip() + "\n")


def _modules() -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        yield from _module(path, ".".join(relative.with_suffix("").parts).removesuffix(".__init__"))


def _module(path: Path, name: str) -> Iterator[Document]:
    """The source of a module and its docstrings. `_pyio` and `io` are one family: each repeats the other."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
        return
    family = "module:" + ".".join(part.removeprefix("_py").lstrip("_") for part in name.split("."))
    yield Document("source", name, family, source)
    docstrings = "\n\n".join(f"{where}\n\n{text}" for where, text in _docstrings(tree, name))
    if docstrings:
        yield Document("docstrings", name, family, docstrings + "\n")


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
        yield f"{name}{_signature(node)}", text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented):
            yield from _docstrings(child, f"{name}.{getattr(child, 'name', '')}")


def _signature(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def _order(document: Document) -> str:
    return hashlib.sha256(document.family.encode()).hexdigest()


def _prose(documents: Iterable[Document]) -> list[Document]:
    return sorted((document for document in documents if document.kind != "source"), key=_order)


def _heldout(documents: list[Document]) -> list[Document]:
    sized = [
        document
        for document in _prose(documents)
        if SMALLEST_HELDOUT_DOCUMENT <= len(document.text) <= LARGEST_HELDOUT_DOCUMENT
    ]
    return list(_first(sized, HELDOUT_BYTES))


def _calibration(documents: list[Document]) -> str:
    return _joined(_first((d for d in _prose(documents) if len(d.text) <= LARGEST_HELDOUT_DOCUMENT), CALIBRATION_BYTES))


def _first(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if total > limit:
            return
        yield document


def _joined(documents: Iterable[Document]) -> str:
    return "\n\n".join(document.text.strip() for document in documents) + "\n"


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Paragraphs long enough to compare, as (words only, as written)."""
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split()).strip("'\" ")
        if len(key) >= SHORTEST_COMPARED_PARAGRAPH:
            yield key, paragraph


def _without(document: Document, secret: set[str]) -> Document:
    text = document.text
    for key, paragraph in _paragraphs(document.text):
        if key in secret:
            text = text.replace(paragraph, "")
    return Document(document.kind, document.name, document.family, text)


def _chats(documents: Iterable[Document]) -> Iterator[Chat]:
    for document in documents:
        if document.kind == "topic":
            yield Chat(f"Explain the Python topic '{document.name}'.", document.text.strip())
        elif document.kind == "source":
            yield from _module_chats(document)


def _module_chats(document: Document) -> Iterator[Chat]:
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    for where, text in _docstrings(tree, document.name):
        yield Chat(f"What does {where.partition('(')[0]} do?", text)
