"""The model card: metadata and text from what the artifact itself says, with the licence block always in it.

What was not measured is called so. A user's own template (Jinja, sandboxed) may replace the text; metadata and licence
block stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from l4pack.artifact.mixture import scheme_layers, scheme_rows, scheme_tag
from l4pack.artifact.policy import Policy, plain
from l4pack.errors import UsageError
from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows
from l4pack.evaluate.sample import turns
from l4pack.model.config import Llama4Config, parse_config
from l4pack.model.tensors import Role
from l4pack.publish.card_check import mark
from l4pack.publish.commands import make_command, request, serve_commands, transformers_code
from l4pack.publish.markdown import code, safe, word
from l4pack.publish.template import render_template
from l4pack.recipe import KEEP, KVStrategy, Recipe
from l4pack.resources import data_text
from l4pack.units import human_bytes
from l4pack.units import with_error as with_digits

NOT_RECORDED = "not recorded"
MAX_TEMPLATE_BYTES = 1_000_000
_TASK_KEYS = ("accuracy_reference", "accuracy")


@dataclass(frozen=True)
class DeviceFit:
    """The largest contexts that fit on a host, with a BF16 and with an FP8 KV cache; 0 when the weights don't.

    `gpus` is what one copy takes of the host's; None when they can't share the model.
    """

    device: str
    gpus: int | None
    max_context: int
    max_context_fp8: int


@dataclass(frozen=True)
class Rung:
    """Another artifact of the same model: its size, its most careful evaluation, and where it runs, in words."""

    name: str
    repository: str | None  # where it is on the Hub, where its card says so
    weight_bytes: int
    accuracy: Mapping[str, Any] | None
    runs: str


@dataclass(frozen=True)
class CardFacts:
    """All a card is made from."""

    name: str
    policy: Policy
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Mapping[str, int]
    base_model: str | None = None
    languages: Sequence[str] = ()
    accuracy: Mapping[str, Any] | None = None  # the most careful evaluation
    others: Sequence[Mapping[str, Any]] = ()  # all other evaluations
    claim: str = ""  # how sure the base model is, in words; nothing to say where the source was read from there
    weight_bytes: int | None = None  # of all tensors
    calibration: Mapping[str, Any] | None = None
    fits: Sequence[DeviceFit] = field(default_factory=list)
    gated: bool = False
    served: Mapping[str, str] = field(default_factory=dict)  # by runtime, the command that was budgeted for
    serves: str = ""  # what those commands were budgeted for, in words
    repository: str | None = None  # where it is, or is about to be, on the Hub
    generation: Mapping[str, Any] = field(default_factory=dict)  # the source's own sampling
    chat: bool = False  # whether there is a template for conversations
    family: Sequence[Rung] = ()  # other artifacts of the same model
    packaged: str = ""  # the day, as 2026-11-26

    @property
    def recipe(self) -> Recipe:
        """The recipe the artifact was made with."""
        return Recipe.model_validate(self.manifest["recipe"])

    @property
    def multimodal(self) -> bool:
        """Whether the model sees images."""
        return self.config.get("vision_config") is not None


def render_card(facts: CardFacts, template: Path | None = None) -> str:
    """The whole README.md. Raises UsageError when the user's template can't be rendered."""
    values = card_values(facts)
    body = (_own_page(values) if template is None else render_template(_read(template), template.name, values)).strip()
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
    values: dict[str, Any] = {**facts.policy.metadata}
    if facts.base_model:
        values |= {"base_model": [facts.base_model], "base_model_relation": "quantized"}
    if facts.languages:
        values["language"] = list(facts.languages)
    if facts.gated:
        values |= facts.policy.gating
    return ModelCardData(
        **values,
        **model_index(facts),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if facts.multimodal else "text-generation",
        tags=[*facts.policy.tags, "compressed-tensors", *formats, "vllm", "l4pack"],
    )


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
        for name, one in _tasks(facts).items()
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


def _own_page(values: Mapping[str, Any]) -> str:
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters["code"] = code
    return environment.from_string(data_text("publish", "templates", "card.md.jinja")).render(values)


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
        "source": source,
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
        "accuracy": _accuracy(facts.accuracy, _tasks(facts)),
        "evaluations": [_in_a_row(one) for one in facts.others],
        "gates": [_gate(gate) for one in (facts.accuracy or {}, *facts.others) for gate in one.get("gates", ())],
        "images": max(map(_images, (facts.accuracy or {}, *facts.others))),
        "said": _said(facts.accuracy),
        "tasks_measured": bool(_tasks(facts)),
        "fits": [_fit(fit) for fit in facts.fits],
        "verdict": _verdict(facts, weights),
        "serves": facts.serves,
        "multimodal": facts.multimodal,
        "sampling": _sampling(facts.generation),
        "safeguards": facts.policy.safeguards.strip(),
        "refusals": _refusals(facts),
        "family": _family(facts, weights),
        "packaged": facts.packaged,
        "sglang_reads": set(scheme_layers(recipe, config)[Role.ATTENTION]) == {KEEP},
        "calibration": _calibration(facts),
        "fallbacks": _fallbacks(facts),
        "commands": _commands(facts),
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


def _tasks(facts: CardFacts) -> dict[str, Mapping[str, Any]]:
    """Each task from the evaluation that asked most of its questions, beside the original where any did."""
    found: dict[str, Mapping[str, Any]] = {}
    for one in (facts.accuracy or {}, *facts.others):
        for name, task in (one.get("tasks") or {}).items():
            if name not in found or _asked(task) > _asked(found[name]):
                found[name] = task
    return dict(sorted(found.items()))


def _asked(task: Mapping[str, Any]) -> tuple[bool, int]:
    return "accuracy_reference" in task, task["questions"]


def _accuracy(measured: Mapping[str, Any] | None, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of paired numbers with their error bars; None when the original was not measured beside the artifact."""
    if measured is None or "kl_mean" not in measured:
        return None
    try:
        return {
            "tokens": f"{measured['tokens']:,}",
            "text": _setting(measured.get("text")),
            "computed": _computed(measured.get("run")),
            "rows": _rows(measured, tasks),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"accuracy.json: {error} is missing or no number", hint="run l4pack evaluate again") from error


def _computed(run: Mapping[str, Any] | None) -> str:
    return f"; {safe(run['dtype'])}, activations {safe(run['activations'])}" if run else ""


def _rows(measured: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def number(key: str) -> str:
        return with_error(measured[key], measured[f"{key}_standard_error"])

    kl = with_error(measured["kl_mean"], measured["kl_standard_error"])
    rows = [
        ("Perplexity", number("perplexity_reference"), number("perplexity_artifact")),
        ("Perplexity ratio", "1", number("perplexity_ratio")),
        ("KL divergence from the original, nats a token", "0", kl),
        ("Same most likely token as the original", "1", number("top1_agreement")),
    ]
    for name, task in tasks.items():
        before, after = (task.get(key) for key in _TASK_KEYS)
        pair = [
            "not measured" if one is None else with_error(one["value"], one["standard_error"])
            for one in (before, after)
        ]
        rows.append((f"Task {safe(name)}, {task['questions']:,} questions, accuracy", pair[0], pair[1]))
    return rows + [_suite_row(one) for one in (measured.get("suites") or {}).values()]


def _suite_row(suite: Mapping[str, Any]) -> tuple[str, str, str]:
    """A set of tasks: its means, and the recovery beside this model's."""
    before, percent = suite.get("mean_reference"), suite.get("recovery_percent")
    recovery = "" if percent is None else f", recovery {percent:.1f} %"
    left = f", without {', '.join(map(safe, suite['left_out']))}" if suite["left_out"] else ""
    what = f"{safe(suite['title'])}: mean of {len(suite['tasks'])} tasks{left}"
    return what, "not measured" if before is None else f"{before:.4f}", f"{suite['mean']:.4f}{recovery}"


def _refusals(facts: CardFacts) -> dict[str, Any] | None:
    """Refusals by the most careful evaluation that asked for them; None where none did."""
    found = next((one["refusals"] for one in (facts.accuracy or {}, *facts.others) if one.get("refusals")), None)
    if found is None:
        return None
    rows = [tuple(cell or "not measured" for cell in row) for row in refusal_rows(found)]
    return {"rows": rows, "lines": refusal_lines(found), "openings": found["openings"], "suite": code(found["suite"])}


def _in_a_row(measured: Mapping[str, Any]) -> dict[str, str]:
    """One more evaluation in a table's row."""
    paired = "kl_mean" in measured
    return {
        "text": _setting(measured.get("text")) + _computed(measured.get("run")),
        "tokens": f"{measured['tokens']:,}",
        "kl": with_error(measured["kl_mean"], measured["kl_standard_error"]) if paired else "not measured",
        "agreement": (
            with_error(measured["top1_agreement"], measured["top1_agreement_standard_error"])
            if paired
            else "not measured"
        ),
    }


def _images(measured: Mapping[str, Any]) -> int:
    """Images in the text of an evaluation beside the original."""
    count = (measured.get("text") or {}).get("images", 0) if "kl_mean" in measured else 0
    return count if isinstance(count, int) else 0


def _said(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What both models say after the same prompts, in bold from where they part; None where they were not asked."""
    found = turns(measured or {})
    if measured is None or not found:
        return None

    def marked(same: str, rest: str | None) -> str:
        if rest is None:
            return "not asked"
        return " ".join([*([code(same)] if word(same) else []), *([f"**{code(rest)}**"] if word(rest) else [])])

    rows = [(safe(one.prompt), marked(one.same, one.original), marked(one.same, one.artifact)) for one in found]
    return {"tokens": measured["sample"]["tokens"], "rows": rows}


def _gate(gate: Mapping[str, Any]) -> str:
    value = "not measured" if gate["value"] is None else f"{gate['value']:.6g}"
    return f"{code(gate['gate'])} {gate['limit']:g}: {value}, {'met' if gate['ok'] else '**missed**'}"


def with_error(value: float, error: float | None) -> str:
    """A number with its standard error, to the digits that the error leaves a meaning."""
    if error is None:
        return f"{value:.4g} (one sequence: no error bar)"
    return with_digits(value, error)


def _setting(text: Any) -> str:
    """The text and setting of a measurement: what its record says that is short; digests stay there."""
    if not isinstance(text, Mapping):
        return NOT_RECORDED
    short = {
        key: value
        for key, value in text.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and not key.endswith("sha256")
    }
    return ", ".join(f"{safe(key.replace('_', ' '))} {safe(value)}" for key, value in sorted(short.items()))


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
    tokens = _tokens_measured(here)
    rows = []
    for one in sorted((here, *facts.family), key=lambda one: -one.weight_bytes):
        link = f"[{one.name}](https://huggingface.co/{word(one.repository)})" if one.repository else one.name
        measured = one.accuracy if one.accuracy and "kl_mean" in one.accuracy else None
        other = "" if _tokens_measured(one) == tokens else ", on another text"
        close, agree = "not measured", "not measured"
        if measured is not None:
            close = with_error(measured["kl_mean"], measured["kl_standard_error"]) + other
            agree = with_error(measured["top1_agreement"], measured["top1_agreement_standard_error"])
        name = f"**{link}** (this)" if one is here else link
        rows.append((name, human_bytes(one.weight_bytes), close, agree, one.runs or "not computed"))
    return rows


def _tokens_measured(one: Rung) -> Any:
    """Which tokens an artifact was measured on: only the same ones make its figures comparable."""
    return ((one.accuracy or {}).get("text") or {}).get("tokens_sha256")


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
    return f"{_setting(facts.calibration.get('text'))}; {experts.count(0)} of {len(experts)} experts saw no token"


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
    return {
        **serve_commands(where, facts.served),
        "request": request(where, multimodal=facts.multimodal),
        "transformers": transformers_code(where, multimodal=facts.multimodal, chat=facts.chat),
        "make": make_command(facts.manifest, facts.recipe.name, word(facts.name)),
    }
