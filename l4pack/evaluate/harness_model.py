"""The model class lm-evaluation-harness is given. Importing this module needs lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.streamed_scorer import Scorer
from l4pack.stream.hidden import TokenSequence
from l4pack.text.tokenizer import load_tokenizer


class StreamedLM(TemplateLM):  # type: ignore[misc] # lm-eval is optional, so mypy does not know its class
    """Log-likelihood tasks; generation needs an engine that holds the model."""

    def __init__(self, checkpoint: Checkpoint, scorer: Scorer) -> None:
        super().__init__()
        self._name, self._scorer = Path(checkpoint.name).name, scorer
        self.tokenizer: Any = load_tokenizer(checkpoint)
        self.max_length = checkpoint.config.text.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens, with the tokenizer's own special ones unless told otherwise or there already."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _pair, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            sequences.append(TokenSequence(tuple(whole), score_from=len(whole) - len(continuation)))
        results = [(float(values.sum()), bool(greedy.all())) for values, greedy in self._scorer(sequences)]
        for (pair, _context, _text), result in zip(requests, results, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        del disable_tqdm
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Not on a streamed model: one token would take a pass over all weights."""
        del requests, disable_tqdm
        raise UsageError(
            "a task asks for generated text, which a streamed model can't give in reasonable time",
            hint="add --backend vllm or --backend transformers on a machine that can load the artifact",
        )
