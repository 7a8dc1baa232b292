"""Token streams of the corpus and random training windows from them."""

import numpy as np
import torch
from demo_corpus import Chat, Corpus, Document
from demo_tokenizer import BEGIN, END, EOT, HEADER_END, HEADER_START
from tokenizers import Tokenizer

LENGTH = 512
SHARES = {"prose": 0.62, "chat": 0.10, "source": 0.28}


def streams(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """One long row of token ids a kind of text; every document starts with BEGIN."""
    prose = [document for document in corpus.documents if document.kind != "source"]
    source = [document for document in corpus.documents if document.kind == "source"]
    texts = {
        "prose": [_plain(document) for document in prose],
        "source": [_plain(document) for document in source],
        "chat": [_turns(chat) for chat in corpus.chats],
    }
    return {kind: _encoded(tokenizer, found) for kind, found in texts.items()}


def _plain(document: Document) -> str:
    return f"{document.text}{END}"


def _turns(chat: Chat) -> str:
    user, assistant = (f"{HEADER_START}{role}{HEADER_END}\n\n" for role in ("user", "assistant"))
    return f"{user}{chat.question}{EOT}{assistant}{chat.answer}{EOT}"


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    rows = [np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(rows))


class Windows:
    """Random windows of LENGTH + 1 tokens; half of them begin with BEGIN, as evaluated texts do."""

    def __init__(self, rows: dict[str, torch.Tensor], begin: int, seed: int) -> None:
        self.rows = rows
        self.begin = begin
        self.random = np.random.default_rng(seed)

    def batch(self, size: int) -> torch.Tensor:
        """[size, LENGTH + 1] token ids."""
        kinds = self.random.choice(list(SHARES), size=size, p=list(SHARES.values()))
        return torch.stack([self._window(self.rows[kind]) for kind in kinds])

    def _window(self, row: torch.Tensor) -> torch.Tensor:
        start = int(self.random.integers(0, len(row) - LENGTH - 1))
        window = row[start : start + LENGTH + 1].clone()
        if self.random.random() < 0.5:
            window[0] = self.begin
        return window


def begin_id(tokenizer: Tokenizer) -> int:
    """The id of BEGIN."""
    return int(tokenizer.token_to_id(BEGIN))
