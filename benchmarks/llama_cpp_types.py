"""GGUF files of l4pack's recipes beside llama.cpp's own types with an importance matrix, by one evaluator.

    python benchmarks/llama_cpp_types.py --libllama PATH/libllama.so --work FOLDER [--samples 32] [--calibration-samples 256]

The model, the demo unless given, goes out as BF16, llama.cpp itself makes `Q4_K_M` and `Q4_0` of that
(`llama_model_quantize`), weighed by an importance matrix of the mean squares of each matrix' inputs on the calibration
text, per expert, as `llama-imatrix` collects them. `kept`: attention, embedding and head stay BF16, `shexp8`: shared experts
and dense MLPs are Q8_0, as in the recipes. Every file is decoded by the gguf library to a float32 checkpoint, which `l4pack
evaluate` compares with the model. `--no-evaluation` ends with those checkpoints, NAME-twin in --work, where the BF16 file and
the importance matrix are taken from if they are there.

libllama.so is in the wheel that `pip wheel llama-cpp-python==0.3.36` builds (25 minutes on two cores), or in any build of llama.cpp
whose `llama.h` has the structures below.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import Llama4ForConditionalGeneration

from l4pack.checkpoint.open import open_source
from l4pack.containers.gguf import rope_factors_name, text_name
from l4pack.export.gguf import Gguf
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.model.names import classify
from l4pack.model.parts import WEIGHT
from l4pack.model.tensors import Role
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "l4pack" / "demo"
KEPT = (("attn_.*weight", "BF16"), ("token_embd", "BF16"), (r"^output\.weight", "BF16"))
EIGHT = ((r"ffn_(gate|up|down)(_shexp)?\.weight", "Q8_0"),)
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}
THEIRS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "Q4_K_M": ("Q4_K_M", ()),
    "Q4_K_M-kept": ("Q4_K_M", KEPT),
    "Q4_K_M-kept-shexp8": ("Q4_K_M", (*KEPT, *EIGHT)),
    "Q4_0-kept": ("Q4_0", KEPT),
}
OURS = ("gguf-q4_k", "gguf-q4_k-best", "int4-g32")
PASSED_BY_ALL = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.LM_HEAD)
Importance = dict[str, NDArray[np.float32]]


class _Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class _Parameters(ctypes.Structure):
    """llama.h, `llama_model_quantize_params` of llama.cpp b11549."""

    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_type", ctypes.c_int), ("embedding_type", ctypes.c_int),
        ("requantize", ctypes.c_bool), ("quantize_output", ctypes.c_bool), ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool), ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p), ("tensor_types", ctypes.POINTER(_Override)), ("prune_layers", ctypes.c_void_p),
        ("buffer_size", ctypes.c_size_t),
    ]  # fmt: skip


def importance(folder: Path, sequences: Iterable[Sequence[int]]) -> Importance:
    """Mean squares of every matrix' inputs, float32 [inputs] or [experts, inputs], by the matrix' name in GGUF."""
    model: Any = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, Any] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]) if inputs.dim() < 4 else inputs[0]
        sums[name][0] = sums[name][0] + (rows**2).sum(-2).double().numpy()
        sums[name][1] = sums[name][1] + (rows.abs().sum(-1) > 0).sum(-1, keepdim=True).numpy()

    for name, module in model.named_modules():
        place = classify(f"{name}.{WEIGHT}") if isinstance(module, torch.nn.Linear) else None
        if place is not None and place.role in PASSED_BY_ALL:
            own = text_name(place.role, name.rpartition(".")[2], place.layer)
            module.register_forward_pre_hook(lambda _, given, own=own: add(own, given[0]))
    for number, layer in enumerate(model.language_model.model.layers):
        if layer.is_moe_layer:
            _watch_experts(layer.feed_forward.experts, number, add)
    with torch.no_grad():
        for tokens in sequences:
            model(input_ids=torch.tensor([list(tokens)]))
    return {name: (total / np.maximum(count, 1)).astype(np.float32) for name, (total, count) in sums.items()}


def _watch_experts(experts: Any, layer: int, add: Callable[[str, torch.Tensor], None]) -> None:
    """Have the experts of a layer add their inputs, [1, experts, tokens, inputs], as they compute."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        states = states.view(len(experts.gate_up_proj), -1, states.shape[-1])
        for projection in ("gate_proj", "up_proj"):
            add(text_name(Role.ROUTED_EXPERT, projection, layer), states[None])
        gate, up = torch.bmm(states, experts.gate_up_proj).chunk(2, -1)
        inner = up * experts.act_fn(gate)
        add(text_name(Role.ROUTED_EXPERT, "down_proj", layer), inner[None])
        return torch.bmm(inner, experts.down_proj).view(-1, states.shape[-1])

    experts.forward = forward


def quantize(
    library: Path, source: Path, out: Path, kind: str, weights: Importance, types: Sequence[tuple[str, str]]
) -> None:
    """Have llama.cpp make a file of one of its types; `types` are patterns of tensors that get another."""
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    asked = llama.llama_model_quantize_default_params()
    asked.nthread, asked.ftype = 1, FILE_TYPES[kind]
    flat = {name: np.ascontiguousarray(values.reshape(-1)) for name, values in weights.items()}
    given = (_Importance * (len(flat) + 1))()
    for place, (name, values) in enumerate(flat.items()):
        given[place] = _Importance(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
    overrides = (_Override * (len(types) + 1))()
    for place, (pattern, name) in enumerate(types):
        overrides[place] = _Override(pattern.encode(), int(gguf.GGMLQuantizationType[name]))
    asked.imatrix = ctypes.cast(given, ctypes.POINTER(_Importance))
    if types:
        asked.tensor_types = ctypes.cast(overrides, ctypes.POINTER(_Override))
    code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(asked))
    if code:
        raise SystemExit(f"llama.cpp did not make {out}: {code}")


def twin(folder: Path, file: Path, out: Path) -> Path:
    """A checkpoint in float32 with the text weights that the file holds, by gguf's decoder."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    held = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        held[tensor.name] = torch.from_numpy(np.array(values, np.float32))
    held.pop(rope_factors_name(), None)
    source = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    made = {name: _held(name, held, value).contiguous() for name, value in source.items()}
    assert all(made[name].shape == value.shape for name, value in source.items())
    save_file(made, out / "model.safetensors", {"format": "pt"})
    config = (out / "config.json").read_text().replace('"bfloat16"', '"float32"')
    (out / "config.json").write_text(config)
    return out


def _held(name: str, held: dict[str, torch.Tensor], original: torch.Tensor) -> torch.Tensor:
    """One of the checkpoint's tensors as the file has it."""
    place = classify(name)
    if place.role in (Role.VISION, Role.PROJECTOR):
        return original.float()
    part = name.removesuffix(f".{WEIGHT}").rpartition(".")[2]
    if place.role is not Role.ROUTED_EXPERT:
        return held[text_name(place.role, part, place.layer)]
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    return torch.cat([held[text_name(place.role, one, place.layer)] for one in parts], 1).mT


def model_in(folder: Path) -> Path:
    """The text model's file."""
    return next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))


def run(*arguments: object) -> dict[str, Any]:
    """What a command of l4pack says as JSON."""
    command = [sys.executable, "-m", "l4pack", *map(str, arguments), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libllama", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    parser.add_argument("--heldout", default="demo", help="text that is measured on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--length", type=int, help="tokens of a sequence; the model's context unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(THEIRS), action="append", help="of llama.cpp's types; may be repeated")
    parser.add_argument("--no-evaluation", action="store_true", help="make llama.cpp's files and their twins only")
    return parser.parse_args()


def ingredients(given: argparse.Namespace) -> tuple[Path, Importance]:
    """The BF16 file and the importance matrix, made once in --work."""
    kept, source = given.work / "importance.npz", open_source(str(given.model))
    run_export(plan_export(source, Gguf()), given.work / "bf16")
    if not kept.exists():
        choice = TextChoice(given.calibration, given.calibration_samples, given.length, given.seed)
        text = load_text(choice, load_tokenizer(source), source.config.text.max_position_embeddings)
        np.savez(kept, **importance(given.model, [one.tokens for one in text.sequences]))
    with np.load(kept) as found:
        return model_in(given.work / "bf16"), dict(found)


def theirs(given: argparse.Namespace) -> dict[str, Path]:
    """llama.cpp's own files."""
    source, weights = ingredients(given)
    files = {}
    for name in given.only or THEIRS:
        kind, types = THEIRS[name]
        files[name] = given.work / f"{name}.gguf"
        quantize(given.libllama, source, files[name], kind, weights, types)
    return files


def ours(given: argparse.Namespace) -> dict[str, Path]:
    """Files of the recipes."""
    length = [] if given.length is None else ["--sequence-length", given.length]
    taken = ["--calibration", given.calibration, "--calibration-samples", given.calibration_samples, *length]
    files = {}
    for recipe in OURS:
        out = given.work / f"{recipe}-gguf"
        run("quantize", given.model, "--recipe", recipe, *taken, "--seed", given.seed, "--out", given.work / recipe)
        run("export", given.work / recipe, "--to", "gguf", "--out", out)
        files[recipe] = model_in(out)
    return files


def main() -> None:
    """Make all files, then a line for each."""
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    files = theirs(given)
    if given.no_evaluation:
        for name, file in files.items():
            twin(given.model, file, given.work / f"{name}-twin")
        return
    files |= ours(given)
    length = [] if given.length is None else ["--sequence-length", given.length]
    print("file  bytes  KL  ±  same token")
    for name, file in files.items():
        copy = twin(given.model, file, given.work / "twin")
        text = ["--text", given.heldout, "--samples", given.samples, *length]
        found = run("evaluate", copy, "--against", given.model, *text)
        measured = f"{found['kl_mean']:.6f}  {found['kl_standard_error']:.6f}  {found['top1_agreement']:.4f}"
        print(f"{name}  {file.stat().st_size:,}  {measured}", flush=True)


if __name__ == "__main__":
    main()
