"""llama.cpp itself, as `xllamacpp` has it in a wheel: the log-probabilities of the next token, one request a position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from numpy.typing import NDArray


class LlamaCpp:
    """A model loaded by llama.cpp, on the CPU."""

    def __init__(self, file: Path, vocabulary: int, context: int = 512, tower: Path | None = None) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        if tower is not None:
            settings.mmproj.path = str(tower)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = context, 1, 1
        settings.warmup = settings.fit_params = False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._vocabulary = vocabulary
        self._server = xllamacpp.Server(settings)

    def next_token(self, tokens: list[int] | str) -> NDArray[np.float64]:
        """float64 [vocabulary] log-probabilities of the token that follows; with a tower, of a text."""
        # Where a token without a text is likeliest nothing would be told; what is told is from before the bias is added.
        asked: dict[str, Any] = {
            "prompt": tokens, "n_predict": 1, "n_probs": self._vocabulary, "temperature": 0.0, "cache_prompt": False,
            "logit_bias": [[ord("a"), 1e3]],
        }  # fmt: skip
        answer = self._server.handle_completions(asked)
        assert "choices" in answer, answer
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        result = np.full(self._vocabulary, -np.inf)
        for entry in found:
            result[entry["id"]] = entry["logprob"]
        return result


def float32_twin(file: Path, twin: Path) -> Path:
    """The same model with every weight as float32: what is left of a difference is not llama.cpp's own rounding."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(twin, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return twin
