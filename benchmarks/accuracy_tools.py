"""How each tool makes what `accuracy.py` evaluates: every one in a process of its own, on the same calibration tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.api import plan
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.model.names import classify
from l4pack.model.tensors import Role
from l4pack.recipe import load_recipe
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
VERSIONS = "VERSIONS "  # what a side in another environment prints before its versions
MEASURED_SAMPLES = 32
FIT, BEST = "fit-", "fit-best-"


@dataclass(frozen=True)
class Model:
    """A trained model and its texts; nothing is calibrated on the held-out one."""

    name: str
    source: str
    calibration: str
    heldout: str


@dataclass(frozen=True)
class Setting:
    """What is the same for all tools, and where each of them is."""

    work: Path
    samples: int
    length: int
    threads: int
    llmcompressor: Path  # interpreters
    autoround: Path
    iterations: int
    libllama: Path | None


@dataclass(frozen=True)
class Job:
    """One cell to make; `folder` is its own."""

    setting: Setting
    model: Model
    method: str
    seed: int
    folder: Path

    @property
    def shared(self) -> Path:
        """What other cells of the model use too."""
        return self.folder.parent

    def calibration(self) -> list[object]:
        """Options of l4pack's commands."""
        taken = ["--calibration", self.model.calibration, "--calibration-samples", self.setting.samples]
        return [*taken, "--sequence-length", self.setting.length, "--seed", self.seed]

    def tokens(self) -> list[list[int]]:
        """The sequences that `l4pack quantize` takes with these options."""
        source = open_source(self.model.source)
        choice = TextChoice(self.model.calibration, self.setting.samples, self.setting.length, self.seed)
        text = load_text(choice, load_tokenizer(source), source.config.text.max_position_embeddings)
        return [list(sequence.tokens) for sequence in text.sequences]


@dataclass(frozen=True)
class Made:
    """What is to be evaluated; bytes of all tensors, the vision tower's in BF16 where the tool leaves it out."""

    checkpoint: str  # in the job's folder
    weight_bytes: int
    cpu_seconds: float | None  # None: not known, as of an artifact that was put into --work by hand
    versions: dict[str, str]


def spend(job: Job, command: list[object]) -> tuple[float, str]:
    """Run a command to its end; its processor seconds and what it said."""
    log = job.folder / "log.txt"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(job.setting.threads))
    with log.open("ab") as stream:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        _, status, usage = os.wait4(process.pid, 0)
    said = log.read_text(errors="replace")
    if status:
        raise SystemExit(f"{said[-3000:]}\n{' '.join(words)} failed; all it said is in {log}")
    return usage.ru_utime + usage.ru_stime, said


def l4pack(job: Job, *words: object) -> float:
    """Run one of l4pack's commands; its processor seconds."""
    return spend(job, [sys.executable, "-m", "l4pack", *words])[0]


def own_versions() -> dict[str, str]:
    """Of the interpreter that runs l4pack."""
    return {"l4pack": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def recipe(job: Job) -> Made:
    """`l4pack quantize` with a recipe that ships."""
    return quantized(job, job.method, 0.0)


def quantized(job: Job, name: str, before: float) -> Made:
    """`l4pack quantize` with any recipe; `before` are processor seconds spent already."""
    shutil.rmtree(job.folder / "artifact", ignore_errors=True)
    given = job.calibration() if load_recipe(name).calibration is not None else []
    words = ["quantize", job.model.source, "--recipe", name, "--out", job.folder / "artifact", "--compute", "cpu"]
    seconds = before + l4pack(job, *words, *given)
    return Made("artifact", open_folder(job.folder / "artifact").weight_bytes, seconds, own_versions())


def fitted(job: Job) -> Made:
    """`l4pack measure`, then `fit` to no more bytes than another recipe's artifact has, by whose name the method's ends;
    `fit-best` is `fit --best`."""
    sensitivity = job.shared / f"sensitivity-{job.seed}.json"
    best = ["--best"] if job.method.startswith(BEST) else []
    other = job.method.removeprefix(BEST if best else FIT)
    seconds = 0.0
    if not sensitivity.exists():
        text = ["--text", job.model.calibration, "--samples", MEASURED_SAMPLES, "--compute", "cpu", "--direct", "few"]
        text += ["--calibration-samples", job.setting.samples, "--sequence-length", job.setting.length]
        seconds += l4pack(job, "measure", job.model.source, *text, "--seed", job.seed, "--out", sensitivity)
    size = plan(job.model.source, other, compute="cpu").artifact_bytes
    out = job.folder / "fit.yaml"
    words = ["--max-bytes", size, "--sensitivity", sensitivity, "--out", out, *best]
    seconds += l4pack(job, "fit", job.model.source, *words)
    return quantized(job, str(out), seconds)


def elsewhere(job: Job, interpreter: Path, side: str, *words: object) -> Made:
    """A tool in an environment of its own, given the tokens in a file."""
    shutil.rmtree(job.folder / "artifact", ignore_errors=True)
    tokens = job.folder / "tokens.json"
    tokens.write_text(json.dumps(job.tokens()))
    # -P: this folder has a kernels.py, which transformers would take for the package of that name.
    command = [interpreter, "-P", HERE / side, job.model.source, tokens, job.folder / "artifact", *words]
    seconds, said = spend(job, command)
    stated = [line.removeprefix(VERSIONS) for line in said.splitlines() if line.startswith(VERSIONS)]
    return Made("artifact", sixteen_bit_bytes(job.folder / "artifact"), seconds, json.loads(stated[-1]))


def sixteen_bit_bytes(folder: Path) -> int:
    """Bytes of all tensors had the tool loaded BF16 and not float32, which only makes it faster on CPUs without."""
    entries = open_folder(folder).entries.values()
    return sum(entry.nbytes // 2 if entry.dtype == "F32" else entry.nbytes for entry in entries)


def llmcompressor(job: Job) -> Made:
    """Its own Llama 4 recipe; float32 products, as in `against_llmcompressor.py --dtype float32`."""
    return elsewhere(job, job.setting.llmcompressor, "llmcompressor_side.py", "float32", job.method)


def autoround(job: Job) -> Made:
    """Signed gradient descent on rounding, exported for llm-compressor's readers."""
    return elsewhere(job, job.setting.autoround, "autoround_side.py", job.method, job.setting.iterations)


def llamacpp(job: Job) -> Made:
    """One of llama.cpp's types with an importance matrix, decoded by gguf's library to a float32 checkpoint."""
    import gguf

    if job.setting.libllama is None:
        raise SystemExit("--libllama is needed for llama.cpp's types; llama_cpp_types.py says where it comes from")
    work, model = job.shared / f"llama.cpp-files-{job.seed}", Path(job.model.source)
    words = [HERE / "llama_cpp_types.py", "--libllama", job.setting.libllama, "--work", work, "--only", job.method]
    words += ["--model", model, *job.calibration()]
    words[words.index("--sequence-length")] = "--length"
    seconds, _ = spend(job, [sys.executable, *words, "--no-evaluation"])
    held = gguf.GGUFReader(work / f"{job.method}.gguf").tensors
    size = sum(int(tensor.n_bytes) for tensor in held) + vision_bytes(job)
    return Made(f"../{work.name}/{job.method}-twin", size, seconds, {"gguf": version("gguf"), "llama.cpp": "b11549"})


def vision_bytes(job: Job) -> int:
    """What artifacts keep in BF16 and a GGUF file of the text model leaves to another file."""
    entries = open_source(job.model.source).entries
    return sum(entries[name].nbytes for name in entries if classify(name).role in (Role.VISION, Role.PROJECTOR))


RECIPES = (
    "int4-uniform", "int4-uniform-best", "int4", "int4-best", "int4-g32", "gguf-q4_k", "gguf-q4_k-best", "nvfp4", "fp8",
)  # fmt: skip
FITS = ("fit-int4-uniform", "fit-best-int4-uniform", "fit-int4", "fit-best-int4")
TOOLS: dict[str, dict[str, Callable[[Job], Made]]] = {
    "llm-compressor": dict.fromkeys(("W4A16", "NVFP4A16"), llmcompressor),
    "l4pack": {**dict.fromkeys(RECIPES, recipe), **dict.fromkeys(FITS, fitted)},
    "llama.cpp": dict.fromkeys(("Q4_K_M", "Q4_K_M-kept", "Q4_K_M-kept-shexp8", "Q4_0-kept"), llamacpp),
    "auto-round": {"W4A16": autoround},
}


def known(made: dict[str, Any]) -> Made:
    """What was made before."""
    return Made(**made)
