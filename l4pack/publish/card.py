"""The model card: metadata and text from what the artifact itself says, with the licence block always in it.

What was not measured is called so. A user's own template (Jinja, sandboxed) may replace the text; metadata and licence
block stay.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FunctionLoader, StrictUndefined

from l4pack.artifact.mixture import scheme_layers, scheme_rows, scheme_tag
from l4pack.artifact.policy import plain
from l4pack.errors import UsageError
from l4pack.model.config import Llama4Config, parse_config
from l4pack.model.tensors import Role
from l4pack.publish.card_check import mark
from l4pack.publish.card_facts import CardFacts, DeviceFit, Rung
from l4pack.publish.card_measured import (
    NOT_RECORDED,
    accuracy_table,
    gate_line,
    images_seen,
    in_a_row,
    refusals,
    said,
    setting,
    tasks_measured,
    tokens_measured,
    with_error,
)
from l4pack.publish.commands import make_command, request, serve_commands, transformers_code
from l4pack.publish.export_card import export_commands, export_values, libraries
from l4pack.publish.markdown import code, safe, word
from l4pack.publish.template import render_template
from l4pack.recipe import KEEP, KVStrategy, Recipe
from l4pack.resources import data_text
from l4pack.units import human_bytes

MAX_TEMPLATE_BYTES = 1_000_000


def render_card(facts: CardFacts, template: Path | None = None) -> str:
    """The whole README.md. Raises UsageError when the user's template can't be rendered."""
    values = card_values(facts)
    page = "card.md.jinja" if facts.export is None else "export.md.jinja"
    body = (
        _own_page(page, values) if template is None else render_template(_read(template), template.name, values)
    ).strip()
    if plain(facts.policy.block) not in plain(body):
        body = f"{facts.policy.block.strip()}\n\n{body}"
    if template is not None:
        body = f"{body}\n\n{mark(values)}"
    card = ModelCard(f"---\n{card_metadata(facts).to_yaml()}\n---\n\n{body}\n")
    return str(card)


def card_metadata(facts: CardFacts) -> ModelCardData:
    """The card's Hub metadata, through huggingface_hub's own class."""
    recipe = facts.recipe
    formats = sorted({scheme_tag(scheme).lower() for scheme in recipe.schemes.values()})
    library, *tags = _libraries(facts)
    values: dict[str, Any] = {**facts.policy.metadata}
    adapters = [one["repository"] for one in facts.manifest["source"].get("adapters", ()) if one["repository"]]
    bases = [*([facts.base_model] if facts.base_model else []), *map(str, adapters)]
    if bases:
        values |= {"base_model": bases, "base_model_relation": "quantized"}
    if facts.languages:
        values["language"] = list(facts.languages)
    if facts.gated:
        values |= facts.policy.gating
    return ModelCardData(
        **values,
        **model_index(facts),
        library_name=library,
        pipeline_tag="image-text-to-text" if facts.multimodal else "text-generation",
        tags=[*facts.policy.tags, *tags[:1], *formats, *tags[1:], "l4pack"],
    )


def _libraries(facts: CardFacts) -> tuple[str, ...]:
    """What the Hub calls the library that loads it, and tags."""
    if facts.export is not None:
        return libraries(facts.export)
    return ("transformers", "compressed-tensors", "vllm") if facts.exported_for is None else ("l4pack",)


def model_index(facts: CardFacts) -> dict[str, Any]:
    """The Hub's `model-index`: what was measured of this artifact, and nothing else."""
    measured = facts.accuracy
    if measured is None or "kl_mean" not in measured:
        return {}
    text = word((measured.get("text") or {}).get("source", "held-out text"))
    task = "image-text-to-text" if facts.multimodal else "text-generation"
    results = [(text, name, key, measured[key]) for name, key in _INDEXED.items()]
    results += [
        (word(name), f"{one.get('metric', 'accuracy')}", "accuracy", one["accuracy"]["value"])
        for name, one in tasks_measured(facts).items()
    ]
    found = [
        EvalResult(task_type=task, dataset_type=_slug(data), dataset_name=data, metric_type=kind, metric_name=name,
                   metric_value=value)
        for data, name, kind, value in results
    ]  # fmt: skip
    return {"model_name": word(facts.name), "eval_results": found}


_INDEXED = {
    "KL divergence from the original, nats a token": "kl_mean",
    "Same most likely token as the original": "top1_agreement",
    "Perplexity": "perplexity_artifact",
}


def _adapter(record: Mapping[str, Any]) -> dict[str, Any]:
    """A merged adapter for the page."""
    repository = record["repository"]
    name = f"[{word(repository)}](https://huggingface.co/{word(repository)})" if repository else code(record["name"])
    return {"name": name, "revision": record["revision"], "sha256": record["sha256"]}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "text"


def _read(template: Path) -> str:
    try:
        with template.open("rb") as stream:
            raw = stream.read(MAX_TEMPLATE_BYTES + 1)
        if len(raw) > MAX_TEMPLATE_BYTES:
            raise UsageError(
                f"{template} is larger than {MAX_TEMPLATE_BYTES:,} bytes", hint="give a Jinja template file"
            )
        return raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{template}: can't be read as text", hint="give a Jinja template file") from error


def _own_page(page: str, values: Mapping[str, Any]) -> str:
    loader = FunctionLoader(partial(data_text, "publish", "templates"))
    environment = Environment(undefined=StrictUndefined, autoescape=False, loader=loader)
    environment.filters["code"] = code
    return environment.get_template(page).render(values)


def card_values(facts: CardFacts) -> dict[str, Any]:
    """What a template may use."""
    manifest, recipe = facts.manifest, facts.recipe
    source = manifest["source"]
    shards = [size for name, size in facts.files.items() if name.endswith(".safetensors")]
    weights, nbytes = facts.weight_bytes or sum(shards), sum(facts.files.values())
    config = parse_config(facts.config)
    return {
        "name": word(facts.name),
        "licence_block": facts.policy.block.strip(),
        "base": facts.base_model,
        "adapters": [_adapter(one) for one in source.get("adapters", ())],
        "source": source,
        "dequantized_from": safe(source.get("dequantized_from") or ""),
        "recipe": {"name": word(recipe.name), "title": safe(recipe.title)},
        "l4pack_version": safe(manifest.get("l4pack_version", "")),
        "claim": facts.claim,
        "size": f"{human_bytes(nbytes)} ({nbytes:,} bytes)",
        "source_size": human_bytes(source["weight_bytes"]),
        "dense_size": human_bytes(2 * source["parameters"]),
        "ratio": f"{source['weight_bytes'] / weights:.2f}" if weights and source["weight_bytes"] else None,
        "shards": len(shards),
        "bits": f"{8 * weights / source['parameters']:.2f}",
        "schemes": _schemes(recipe, config),
        "accuracy": accuracy_table(facts.accuracy, tasks_measured(facts)),
        "evaluations": [in_a_row(one) for one in facts.others],
        "gates": [gate_line(gate) for one in (facts.accuracy or {}, *facts.others) for gate in one.get("gates", ())],
        "images": max(map(images_seen, (facts.accuracy or {}, *facts.others))),
        "said": said(facts.accuracy),
        "tasks_measured": bool(tasks_measured(facts)),
        "fits": [_fit(fit) for fit in facts.fits],
        "verdict": _verdict(facts, weights),
        "serves": facts.serves,
        "multimodal": facts.multimodal,
        "sampling": _sampling(facts.generation),
        "safeguards": facts.policy.safeguards.strip(),
        "refusals": refusals(facts),
        "family": _family(facts, weights),
        "packaged": facts.packaged,
        "sglang_reads": set(scheme_layers(recipe, config)[Role.ATTENTION]) == {KEEP},
        "calibration": _calibration(facts),
        "fallbacks": _fallbacks(facts),
        "exported_for": facts.exported_for[0] if facts.exported_for else None,
        "commands": _commands(facts),
        **({} if facts.export is None else {"export": export_values(facts, facts.export)}),
    }


def _schemes(recipe: Recipe, config: Llama4Config) -> list[dict[str, str]]:
    """What each role of the model got; roles that got the same stand together."""
    rows = [
        {"what": what, "roles": ", ".join(role.value.replace("_", " ") for role in roles)}
        for what, roles in scheme_rows(recipe, config)
    ]
    if recipe.kv_cache is not None:
        each = "layer" if recipe.kv_cache.strategy is KVStrategy.TENSOR else "KV head of a layer"
        rows.append({"what": f"FP8, with a scale of keys and one of values for each {each}", "roles": "KV cache"})
    return rows


def _fit(fit: DeviceFit) -> dict[str, str]:
    """A row of the memory table; what is too large and what can't be split are told apart."""
    if fit.gpus is None:
        return {"device": fit.device, "gpus": "", "bf16": "can't be split", "fp8": "can't be split"}
    bf16, fp8 = (f"{most:,}" if most else "too large" for most in (fit.max_context, fit.max_context_fp8))
    return {"device": fit.device, "gpus": str(fit.gpus), "bf16": bf16, "fp8": fp8}


def _verdict(facts: CardFacts, weights: int) -> dict[str, str]:
    """What it is, where it runs, how close it is: one line each."""
    source = facts.manifest["source"]
    bits = ", ".join(sorted({scheme_tag(scheme) for scheme in facts.recipe.schemes.values()}))
    smaller = f", {source['weight_bytes'] / weights:.1f} times smaller" if weights else ""
    runs = facts.serves or next(
        (f"{fit.device}, up to {fit.max_context_fp8:,} tokens" for fit in facts.fits if fit.max_context_fp8), ""
    )
    measured = facts.accuracy
    close = "not measured"
    if measured is not None and "kl_mean" in measured:
        kl = with_error(measured["kl_mean"], measured["kl_standard_error"])
        close = f"KL divergence {kl} nats a token, the same likeliest token {100 * measured['top1_agreement']:.1f} % of the time"
    return {
        "what": f"{bits}: {human_bytes(weights)} of weights{smaller}",
        "runs": runs or "not computed",
        "close": close,
    }


def _family(facts: CardFacts, weights: int) -> list[tuple[str, str, str, str, str]]:
    """A row for each artifact of the family, this one among them, from large to small."""
    if not facts.family:
        return []
    here = Rung(word(facts.name), None, weights, facts.accuracy, facts.serves)
    tokens = tokens_measured(here)
    rows = []
    for one in sorted((here, *facts.family), key=lambda one: -one.weight_bytes):
        link = f"[{one.name}](https://huggingface.co/{word(one.repository)})" if one.repository else one.name
        measured = one.accuracy if one.accuracy and "kl_mean" in one.accuracy else None
        other = "" if tokens_measured(one) == tokens else ", on another text"
        close, agree = "not measured", "not measured"
        if measured is not None:
            close = with_error(measured["kl_mean"], measured["kl_standard_error"]) + other
            agree = with_error(measured["top1_agreement"], measured["top1_agreement_standard_error"])
        name = f"**{link}** (this)" if one is here else link
        rows.append((name, human_bytes(one.weight_bytes), close, agree, one.runs or "not computed"))
    return rows


def _sampling(generation: Mapping[str, Any]) -> list[str]:
    """The sampling that the source's makers set, as its generation_config.json has it."""
    return [
        f"{key} {value:g}"
        for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if isinstance(value := generation.get(key), int | float) and not isinstance(value, bool)
    ]


def _calibration(facts: CardFacts) -> str:
    if facts.recipe.calibration is None:
        return "none: every weight is rounded by itself"
    if facts.calibration is None:
        return NOT_RECORDED
    tokens = facts.calibration.get("routed_tokens", {}).values()
    experts = [count for layer in tokens for count in layer]
    return f"{setting(facts.calibration.get('text'))}; {experts.count(0)} of {len(experts)} experts saw no token"


def _fallbacks(facts: CardFacts) -> str:
    if facts.recipe.calibration is None:
        return "none: rounding has nothing to fall back to"
    if facts.calibration is None:
        return NOT_RECORDED
    solved = [found for found in facts.calibration.get("matrices", {}).values() if "error" in found]
    if not solved:
        return "none: rounding has nothing to fall back to"
    methods = [found.get("method") for found in solved]
    listed = "; l4pack-calibration.json lists them" if "rtn" in methods else ""
    return f"{methods.count('rtn')} of {len(methods)} matrices are rounded to nearest instead{listed}"


def _commands(facts: CardFacts) -> dict[str, str]:
    """Commands to serve, to ask and to make the artifact."""
    where = word(facts.repository or f"ORG/{facts.name}")
    make = partial(make_command, facts.manifest, facts.recipe.name)
    if facts.export is not None:
        return {**export_commands(where, word(facts.name), facts.export), "make": make(word(facts.export.artifact))}
    if facts.exported_for is not None:
        name, container = word(facts.name), facts.exported_for[1]
        files = shlex.join(["l4pack", "export", name, "--to", container, "--out", f"{name}-{container}"])
        return {"download": f"hf download {where} --local-dir {name}", "export": files, "make": make(name)}
    return {
        **serve_commands(where, facts.served),
        "request": request(where, multimodal=facts.multimodal),
        "transformers": transformers_code(where, multimodal=facts.multimodal, chat=facts.chat),
        "make": make(word(facts.name)),
    }
