"""Write docs/reference from what the program itself says: commands, keys of schemas, functions with their examples.

python tools/make_reference.py           # rewrite the pages
python tools/make_reference.py --check   # exit 1 when a page is out of date
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import l4pack
from l4pack.formats.format import Format
from l4pack.formats.known import format_names, load_format
from l4pack.model.tensors import QUANTIZABLE, Role
from l4pack.quant.scheme import Scheme
from l4pack.recipe import (
    Calibration,
    Gates,
    GptqOptions,
    KVCache,
    Promise,
    Recipe,
    RecipeScheme,
    Rule,
    load_recipe,
    recipe_names,
)

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reference"

MEANINGS = {
    "name": "How the recipe is called: lower-case letters, digits, `.`, `_`, `-`.",
    "title": "One line that says what it is.",
    "schemes": "Named schemes; rules refer to them.",
    "rules": "The first rule that matches a tensor decides. A rule that matches nothing is an error.",
    "promise": "What the recipe was made for.",
    "num_bits": "Width of a level.",
    "type": "`int` levels, or `float`: FP8 E4M3 in eight bits, FP4 E2M1 in four.",
    "strategy": "Which weights share a scale; `tensor_group`: a group's, over a global one of the matrix (NVFP4).",
    "group_size": "Input features in a group; must divide every matrix.",
    "block_structure": "Rows and columns of a block.",
    "symmetric": "Whether zero is a level in the middle, with no zero point stored.",
    "observer": "`minmax` takes a group's extremes, `mse` the clip with the least squared error.",
    "scale_rule": "`full_range` is compressed-tensors' scale, `meta` is Meta's (positive maxima clip).",
    "scale_dtype": "The dtype scales are stored in; `source` is the dtype of the weights.",
    "format": "The on-disk format that holds it; see [formats](formats.md).",
    "method": "How levels are found.",
    "activations": "What a runtime does to the inputs of a matrix; `static_tensor` is calibrated.",
    "gptq": "Options of method `gptq`.",
    "kv_cache": "A KV cache kept in FP8, whose scales calibration finds; see [calibration](../explanation/calibration.md).",
    "keep_float32": "Leave tensors that are kept and float32 so; otherwise they are rounded to the model's 16-bit dtype.",
    "dtype": "Dtype of keys and values.",
    "calibration": "The text that calibrated schemes look at; needed by them, refused without them.",
    "act_order": "Round the columns that matter most first. Groups keep their places, so no index is stored.",
    "dampening": "Added to the Hessian's diagonal, as a fraction of its mean; raised by steps if that is not enough.",
    "sweeps": "Passes of coordinate descent after GPTQ.",
    "asymmetric": "Share of the input error made so far that weights make up for; 0 runs the quantized model alone.",
    "two_sided": "Weigh errors of outputs by what they do to the model's end; the model is walked back first to know.",
    "output_dampening": "As `dampening`, of what outputs weigh; with `two_sided` alone.",
    "samples": "Most sequences taken.",
    "sequence_length": "Tokens of a sequence; `null`: 2048, or the model's context if that is shorter.",
    "seed": "Which sequences are taken.",
    "min_tokens": "An expert that sees fewer borrows the tokens it most nearly got.",
    "max_cold_experts": "Largest share of routed experts that may see no token; above it the job ends with exit 6.",
    "max_fallbacks": "Largest share of matrices that may end rounded to nearest; above it the job ends with exit 6.",
    "gradient_samples": "Sequences, the first of `samples`, that the model is walked back on where a scheme is two-sided.",
    "roles": "Roles of tensors, or `all`.",
    "layers": "Layers, counted from 0; negative numbers from the last.",
    "scheme": "The name of a scheme, or `keep` to leave tensors as they are.",
    "model": "`llama-4-scout` or `llama-4-maverick`.",
    "device": "A device or host by name, as `8xh100`.",
    "context": "Tokens of one sequence.",
    "sequences": "Sequences at once.",
    "kv_dtype": "Dtype of the KV cache.",
    "gates": "The least accuracy to keep.",
    "max_kl": "Largest mean KL divergence (reference || artifact).",
    "min_agreement": "Smallest share of tokens with the same most likely next token.",
    "max_perplexity_ratio": "Largest ratio of perplexities, artifact over reference.",
}


RESULTS: dict[str, dict[str, str]] = {
    "plan": {
        "artifact_bytes": "bytes of all files of the artifact",
        "weight_bytes": "of these, tensors",
        "files": "every file and its exact bytes",
        "bits_per_weight": "bits a quantized weight takes, scales included",
        "peak_ram_bytes": "most memory the job takes",
        "peak_vram_bytes": "most memory of a device",
        "disk_bytes": "disk it needs at its peak, the artifact included",
        "read_bytes": "bytes of weights it reads",
        "warnings()": "what is odd about the source, and what a runtime can't do with the artifact",
    },
    "quantize": {
        "out": "the folder",
        "seconds": "what it took",
        "read_bytes": "bytes of weights read now",
        "resumed_bytes": "bytes that an earlier run was done with",
        "peak_rss_bytes": "most memory taken",
        "already_done": "whether the folder held this artifact before",
    },
    "verify": {
        "ok": "no error, and something was really checked",
        "findings": "each with `rule`, `where`, `message`, `level` (`error` or `warning`)",
        "errors": "how many of them are errors",
    },
    "budget": {
        "fits": "whether it surely fits",
        "headroom_bytes": "bytes to spare on each GPU, negative where they lack",
        "max_context": "most tokens a sequence, at this number of sequences",
        "max_sequences": "most sequences, at this context",
        "changes": "what would make it fit, each with `what`, `option`, `max_context`, `headroom_bytes`",
        "promised_by": "the recipe whose promise filled in what was not said",
        "serve": "the command that serves it, where it fits",
        "record()": "the object that `l4pack budget --json` prints",
    },
    "evaluate": {
        "kl_mean": "mean KL divergence of the original from the artifact, nats a token",
        "kl_standard_error": "its standard error",
        "top1_agreement": "share of tokens with the same likeliest token",
        "perplexity_reference": "of the original",
        "perplexity_artifact": "of the artifact",
        "tokens": "tokens scored",
        "layers": "each layer's errors, with `layer`, `residual_error`, `experts` and more",
        "gates": "each with `gate`, `limit`, `value`, `ok`",
        "plain()": "the record as `accuracy.json` holds it",
    },
    "export": {
        "out": "the folder",
        "seconds": "what it took",
        "proof": "what was read back: `matrices`, `weights`, `rounded`, `largest_error`; None where it was there before",
        "peak_rss_bytes": "most memory taken",
    },
    "dequantize": {
        "out": "the folder",
        "seconds": "what it took",
        "peak_rss_bytes": "most memory taken",
        "already_done": "whether the folder held this checkpoint before",
    },
    "package": {
        "name": "the name that the artifact may have",
        "written": "files that were written",
        "missed": "gates that a recorded evaluation missed",
    },
    "push": {
        "ready": "what was checked, in words",
        "plan": "`steps` (each `name`, `size`, `action`), `send_bytes`, `private`, `exists`",
        "done": "`commit`, `url`, `pull_request`, `files`; None of a dry run",
    },
}
"""What each function gives, by attribute; these keep their meaning."""


def main() -> None:
    """Write or check every page."""
    pages = {
        "cli.md": cli_page(),
        "recipes.md": recipes_page(),
        "formats.md": formats_page(),
        "python.md": python_page(),
    }
    stale = [name for name, text in pages.items() if not (OUT / name).exists() or (OUT / name).read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python tools/make_reference.py" if stale else 0)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (OUT / name).write_text(pages[name])
        print(f"wrote docs/reference/{name}")


def cli_page() -> str:
    """Every command's help, as Typer writes it."""
    command = [sys.executable, "-m", "typer", "l4pack.cli.app", "utils", "docs", "--name", "l4pack"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return text.rstrip() + "\n"


def recipes_page() -> str:
    """The recipe schema and every shipped recipe."""
    parts = [
        "# Recipes\n",
        "A recipe is a YAML file. Unknown keys, repeated keys and aliases are refused. `extends: NAME` starts from a "
        "shipped recipe and replaces the keys given.\n",
        f"Roles: {', '.join(f'`{role.value}`' for role in Role)}. "
        f"Only {', '.join(f'`{role.value}`' for role in QUANTIZABLE)} may get a scheme.\n",
        keys("A recipe", Recipe),
        keys("A scheme, under `schemes`", RecipeScheme, order=[*Scheme.model_fields]),
        keys("`gptq` of a scheme", GptqOptions),
        keys("A rule, under `rules`", Rule),
        keys("`calibration`", Calibration),
        keys("`kv_cache`", KVCache),
        keys("`promise`", Promise),
        keys("`promise.gates`", Gates),
        "## The shipped recipes\n",
    ]
    for name in recipe_names():
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        parts.append(f"### {name}\n\n{load_recipe(name).title}.\n\n```yaml\n{text}```\n")
    return "\n".join(parts)


def keys(title: str, kind: type[BaseModel], order: Iterable[str] = ()) -> str:
    """A table of a schema's keys."""
    rows = [f"## {title}\n", "| key | default | values | meaning |", "|---|---|---|---|"]
    properties: dict[str, Any] = kind.model_json_schema(mode="validation")["properties"]
    for name in dict.fromkeys([*order, *kind.model_fields]):
        field = kind.model_fields[name]
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        rows.append(f"| `{name}` | {default} | {allowed(field.annotation, properties[name])} | {MEANINGS[name]} |")
    return "\n".join(rows) + "\n"


def shown(value: object) -> str:
    """A default as YAML writes it."""
    match value:
        case Enum():
            return str(value.value)
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case BaseModel():
            return "{}"
    return str(value)


def allowed(annotation: Any, schema: dict[str, Any]) -> str:
    """The values a key takes, where they can be listed."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    for option in (schema, *schema.get("anyOf", ())):
        if "enum" in option:
            return ", ".join(f"`{value}`" for value in option["enum"])
    types = [
        option["type"] for option in (schema, *schema.get("anyOf", ())) if option.get("type") not in (None, "null")
    ]
    return " or ".join(types)


_FORMATS = """The planner, the writer, the reader and the verifier ask the same object, in `l4pack/formats/`. What runtimes can't read
is data, in `formats/*.yaml`.
"""


def formats_page() -> str:
    """Every shipped format: its tensors and its readers."""
    parts = ["# Formats\n", _FORMATS]
    for form in map(load_format, format_names()):
        parts += [f"## {form.name}\n\n{form.title}.\n", tensors(form), readers(form)]
    return "\n".join(parts)


def tensors(form: Format) -> str:
    """A table of the tensors that stand for one matrix `[out, in]`."""
    rows = ["| tensor | dtype | shape by strategy | when |", "|---|---|---|---|"]
    for piece in form.pieces:
        shapes = "; ".join(f"{strategy.value}: `[{', '.join(shape)}]`" for strategy, shape in piece.shape.items())
        rows.append(f"| `{piece.suffix}` | {piece.dtype} | {shapes} | {piece.when or 'always'} |")
    return "\n".join(rows) + "\n"


def readers(form: Format) -> str:
    """What each runtime does with the format."""
    rows = []
    for reader in form.readers:
        limits = "; ".join(f"{limit.severity}: {limit.says}" for limit in (*reader.limits, *reader.shapes))
        rows.append(f"- {reader.runtime} {reader.version}: {limits or 'no known limits'}")
    return "\n".join(rows) + "\n"


def python_page() -> str:
    """Every function of the package: signature, text, example, and what its result says."""
    parts = [
        "# Python\n",
        "The steps of the command line as functions of the package `l4pack`: the same code, the same bytes. They print "
        "nothing, and\n`import l4pack` imports nothing slow. What is named here keeps its meaning; whatever else is in the "
        "package may change.\n",
        "```python\nimport l4pack\n```\n",
        "What goes wrong is raised as an error of `l4pack.errors`, all of them `L4packError` with `message` (what and where),\n"
        "`hint` (what to do) and `exit_code` (of the command). A `Place` is a string or a path, a `Size` is bytes or text such\n"
        'as `"4GB"`, an `Advance` is called with a number of bytes. The examples are run, in this order, by the project\'s '
        "tests.\n",
    ]
    names = [name for name in l4pack.api.__dict__ if name in l4pack.__all__]
    return "\n".join([*parts, *map(function, names)])


def function(name: str) -> str:
    """The part of a page about one function."""
    found = getattr(l4pack, name)
    text, _, example = inspect.getdoc(found).partition("\n>>> ")
    rows = [f"| `{key}` | {meaning} |" for key, meaning in RESULTS.get(name, {}).items()]
    table = ["| of the result | is |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(
        [f"## {name}\n", f"```python\n{signature(name)}\n```\n", text, "```pycon", f">>> {example}", "```\n", *table]
    )


def signature(name: str) -> str:
    """How a function is called, an argument a line."""
    shown = inspect.signature(getattr(l4pack, name))
    lines = [
        f"{one.name}: {one.annotation}" + ("" if one.default is one.empty else f" = {one.default!r}".replace("'", '"'))
        for one in shown.parameters.values()
    ]
    first = next(i for i, one in enumerate(shown.parameters.values()) if one.kind is inspect.Parameter.KEYWORD_ONLY)
    lines.insert(first, "*")
    return f"l4pack.{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {shown.return_annotation}"


if __name__ == "__main__":
    main()
