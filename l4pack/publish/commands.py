"""What a visitor of a model's page types: to install, to serve, to ask, to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from l4pack.budget.serve import on_lines
from l4pack.publish.markdown import word
from l4pack.recipe import recipe_names

QUESTION = "What is in this picture?"


def serve_commands(where: str, served: Mapping[str, str]) -> dict[str, str]:
    """The servers' commands for a shell, by runtime; `served` has those that were budgeted for."""
    plain = {"vllm": f"vllm serve {where}", "sglang": f"python -m sglang.launch_server --model-path {where}"}
    return {name: on_lines(served.get(name, command)) for name, command in plain.items()}


def request(where: str, *, multimodal: bool) -> str:
    """A call of the server's OpenAI-style interface."""
    text = {"type": "text", "text": QUESTION if multimodal else "Why is the sky blue?"}
    picture = {
        "type": "image_url",
        "image_url": {
            "url": "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/rabbit.jpg"
        },
    }
    content = [text, picture] if multimodal else [text]
    body = {"model": where, "messages": [{"role": "user", "content": content}]}
    return "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d " + shlex.quote(
        json.dumps(body, indent=2)
    )


def transformers_code(where: str, *, multimodal: bool, chat: bool) -> str:
    """Python that loads a model and lets it say something; `chat` where it has a template for conversations."""
    model = "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"
    reader = "AutoProcessor" if multimodal else "AutoTokenizer"
    asked = _CHAT if chat else _COMPLETION
    return (
        f"from transformers import {model}, {reader}\n\n"
        f'model = {model}.from_pretrained("{where}", dtype="auto", device_map="auto")\n'
        f'reader = {reader}.from_pretrained("{where}")\n{asked}'
        "outputs = model.generate(**inputs, max_new_tokens=64)\n"
        'print(reader.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])'
    )


_CHAT = """messages = [{"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]}]
inputs = reader.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
"""
_COMPLETION = """inputs = reader(text="The sky is blue because", return_tensors="pt").to(model.device)
"""


def make_command(manifest: Mapping[str, Any], recipe: str, name: str) -> str:
    """The command that was run, as the manifest keeps it; the folder it went to is nobody's business."""
    source = manifest["source"]
    revision = f"@{word(source['revision'])}" if source.get("revision") else ""
    made_from = f"{word(source.get('repository') or source['name'])}{revision}"
    given = {"--recipe": recipe if recipe in recipe_names() else f"{recipe}.yaml"}
    options = (manifest.get("job") or {}).get("options") or given
    merged = [
        part
        for one in source.get("adapters", ())
        for part in typed(
            "--lora", f"{one['repository'] or one['name']}{'@' if one['revision'] else ''}{one['revision'] or ''}"
        )
    ]
    words = [part for option, value in options.items() for part in typed(option, value)]
    return shlex.join(["l4pack", "quantize", made_from, *merged, *words, "--out", name])


def typed(option: str, value: Any) -> list[str]:
    """An option of the manifest as it is typed: a list is one given several times, true one without a value."""
    if value is True:
        return [word(option)]
    values = value if isinstance(value, list) else [value]
    return [part for one in values for part in (word(option), word(one))]
