"""Checkpoints that must not be quantized: `SPOILERS` maps the failure to what makes it, the exit code and the message.

Each spoiler is handed a copy of a tiny Scout in three shards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
GATE_UP = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
ROUTER = "language_model.model.layers.1.feed_forward.router.weight"
SHARED = "language_model.model.layers.2.feed_forward.shared_expert.down_proj.weight"


class Bad(NamedTuple):
    """What spoils a folder, and the message to expect; the exit code is that of a bad source."""

    spoil: Callable[[Path], object]
    message: str
    recipe: str = "int4-rtn"


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of the first shard and leave the bytes behind it."""

    def spoil(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return spoil


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of a shard's first tensor."""
    return next(value for name, value in header.items() if name != "__metadata__")


def shift(start: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Move the place of a shard's first tensor."""

    def change(header: dict[str, Any]) -> None:
        entry = first_tensor(header)
        entry["data_offsets"] = [entry["data_offsets"][0] + start, entry["data_offsets"][1] + end]

    return change


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Change the weight map."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change config.json."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def poison(name: str, value: float, *, last: bool = False) -> Callable[[Path], None]:
    """Put a NaN or infinity into one weight of one tensor."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            state = load_file(path)
            if name in state:
                state[name].view(-1)[-1 if last else 1000 % state[name].numel()] = value
                save_file(state, path, {"format": "pt"})

    return spoil


def rewrite(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Replace one tensor."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            state = load_file(path)
            if name in state:
                state[name] = change(state[name]).contiguous()
                save_file(state, path, {"format": "pt"})

    return spoil


def write(file: str, content: bytes) -> Callable[[Path], object]:
    """Replace a whole file."""
    return lambda folder: (folder / file).write_bytes(content)


def remove(file: str) -> Callable[[Path], object]:
    """Remove a file."""
    return lambda folder: (folder / file).unlink()


def cut(file: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    """Shorten or lengthen a file."""

    def spoil(folder: Path) -> None:
        with (folder / file).open("r+b") as stream:
            stream.truncate(keep((folder / file).stat().st_size))

    return spoil


def move_outside(folder: Path) -> None:
    """A shard that lies elsewhere, named by an index that leads there."""
    (folder / FIRST).rename(folder.parent / "elsewhere.safetensors")
    edit_index(lambda m: m.update({k: "../elsewhere.safetensors" for k, v in m.items() if v == FIRST}))(folder)


def empty(folder: Path) -> None:
    """Nothing at all."""
    shutil.rmtree(folder)
    folder.mkdir()


def only_config(folder: Path) -> None:
    """A configuration and no weights."""
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


def quantized(folder: Path) -> None:
    """A configuration that says so, and a tensor that bears it out."""
    edit_config(lambda c: c.update(quantization_config={"quant_method": "fp8"}))(folder)
    rewrite(SHARED, lambda tensor: tensor.to(torch.float8_e4m3fn))(folder)


NAN, INFINITY = float("nan"), float("inf")
SPOILERS: dict[str, Bad] = {
    "truncated shard": Bad(cut(FIRST, lambda size: size - 1), f"{FIRST} is truncated"),
    "shard cut in its header": Bad(cut(FIRST, lambda _: 100), f"{FIRST} claims a header of .* in a file of 100"),
    "empty shard": Bad(cut(FIRST, lambda _: 0), f"{FIRST} claims a header of 0 bytes in a file of 0"),
    "shard with bytes behind it": Bad(cut(FIRST, lambda size: size + 1), f"{FIRST} is longer than its header says"),
    "huge header length": Bad(write(FIRST, b"\xff" * 8 + b"{}"), f"{FIRST} claims a header of 18,446,744,073,709,551,615"),
    "deep header": Bad(write(FIRST, (10**6).to_bytes(8, "little") + b"[" * 10**6), f"{FIRST} has a header that is not valid"),
    "overlapping tensors": Bad(edit_header(shift(0, 256)), f"{FIRST} gives tensor .* needs"),
    "gap between tensors": Bad(edit_header(shift(256, 256)), f"{FIRST} places tensor .* so that it"),
    "offsets out of range": Bad(edit_header(shift(10**12, 10**12)), f"{FIRST} places tensor .* so that it"),
    "wrong dtype": Bad(edit_header(lambda h: first_tensor(h).update(dtype="F32")), f"{FIRST} gives tensor .* F32 .* needs"),
    "unknown dtype": Bad(edit_header(lambda h: first_tensor(h).update(dtype="F12")), "unknown dtype 'F12'"),
    "dtype of the same width": Bad(rewrite(ROUTER, lambda t: t.view(torch.int16)), f"{ROUTER} is I16; l4pack reads"),
    "offsets of thousands of digits": Bad(edit_header(lambda h: first_tensor(h).update(data_offsets=[-(10**4299), 10**4299])), "describes tensor .* wrongly"),
    "offsets that are no numbers": Bad(edit_header(lambda h: first_tensor(h).update(data_offsets=[False, True])), "describes tensor .* wrongly"),
    "name twice in a header": Bad(write(FIRST, (18).to_bytes(8, "little") + b'{"a": 1, "a": 2}  '), "a name appears twice"),
    "index leads outside": Bad(move_outside, r"'\.\./elsewhere\.safetensors', which is not a shard of this folder"),
    "index with an absolute path": Bad(edit_index(lambda m: m.update({ROUTER: "/etc/passwd"})), "'/etc/passwd', which is not"),
    "index into a folder": Bad(edit_index(lambda m: m.update({ROUTER: "a/b.safetensors"})), "which is not a shard of this folder"),
    "index with a name no file can have": Bad(edit_index(lambda m: m.update({ROUTER: "a" * 300 + ".safetensors"})), "which is not a shard of this folder"),
    "index that is not JSON": Bad(write(INDEX, b"{"), f"{INDEX} has no readable weight_map"),
    "index at odds with a shard": Bad(edit_index(lambda m: m.update({"ghost": FIRST})), "places ghost in .* does not hold it"),
    "missing shard": Bad(remove(SECOND), f"1 of 3 shards are missing, the first is {SECOND}"),
    "missing index": Bad(remove(INDEX), f"has 3 shards but no {INDEX}"),
    "tensor in two shards": Bad(lambda f: shutil.copy(f / FIRST, f / SECOND), "which does not hold it"),
    "missing tensor": Bad(edit_config(lambda c: c["text_config"].update(num_hidden_layers=5, no_rope_layers=None, moe_layers=None)), "tensors that config.json implies are missing"),
    "tensor of no Llama 4": Bad(edit_config(lambda c: c["text_config"].update(num_hidden_layers=3, no_rope_layers=None, moe_layers=None)), "tensors are not part of Llama 4, the first is"),
    "transposed experts": Bad(rewrite(GATE_UP, lambda t: t.mT), rf"{GATE_UP} has shape \[4, 256, 128\], config\.json makes it \[4, 128, 256\]"),
    "NaN in quantized experts": Bad(poison(GATE_UP, NAN), rf"{GATE_UP} \(.*experts\.0\.up_proj, output .*, input 3\) holds an infinite or NaN weight"),
    "infinity at the end of the experts": Bad(poison(GATE_UP, INFINITY, last=True), r"experts\.3\.up_proj, output 127, input 127\) holds"),
    "infinity in a quantized shared expert": Bad(poison(SHARED, -INFINITY), rf"{SHARED} \(.*output 7, input 104\) holds an infinite"),
    "NaN in a kept tensor": Bad(poison(ROUTER, NAN), f"{ROUTER} holds an infinite or NaN weight"),
    "infinity at the end of a kept tensor": Bad(poison(ROUTER, INFINITY, last=True), f"{ROUTER} holds an infinite or NaN"),
    "NaN in experts that are unfused and kept": Bad(poison(GATE_UP.replace(".1.", ".0."), NAN), "holds an infinite or NaN weight", "meta-fp8"),
    "NaN in FP8 experts": Bad(poison(GATE_UP, NAN), "holds an infinite or NaN weight", "fp8-block"),
    "another model": Bad(edit_config(lambda c: c.update(model_type="llama")), "model_type is 'llama', not a Llama 4 model"),
    "no model type": Bad(edit_config(lambda c: c.pop("model_type")), "model_type is None, not a Llama 4 model"),
    "configuration that is not JSON": Bad(write("config.json", b"{'model_type'}"), "not JSON"),
    "configuration that is a list": Bad(write("config.json", b"[]"), "the file is not an object"),
    "NaN in the configuration": Bad(edit_config(lambda c: c.update(extra=NAN)), "NaN is not a JSON number"),
    "infinity in the configuration": Bad(edit_config(lambda c: c["text_config"].update(rms_norm_eps=INFINITY)), "Infinity is not a JSON number"),
    "half a character in the configuration": Bad(edit_config(lambda c: c.update(extra="\ud800")), "not JSON .*surrogates"),
    "impossible number in the configuration": Bad(edit_config(lambda c: c["text_config"].update(hidden_size=-1)), r"text_config\.hidden_size"),
    "already quantized": Bad(quantized, "is quantized already"),
    "empty folder": Bad(empty, "has no config.json"),
    "configuration only": Bad(only_config, "holds no safetensors files"),
}  # fmt: skip
