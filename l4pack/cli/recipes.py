"""`l4pack recipes` and `l4pack formats`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.cli.options import AsJsonOption, ExplainedOption

if TYPE_CHECKING:
    from l4pack.formats.format import Format
    from l4pack.formats.readers import FormatReader
    from l4pack.recipe import Recipe, RecipeScheme


def recipes(name: ExplainedOption = None, as_json: AsJsonOption = False) -> None:
    """List the recipes, or explain one (a shipped name or a YAML file).

    Example: `l4pack recipes int4`
    """
    from l4pack.recipe import load_recipe, recipe_names

    chosen = [load_recipe(each) for each in ([name] if name else recipe_names())]
    if as_json:
        console.show_json({"recipes": [recipe.model_dump(mode="json") for recipe in chosen]})
    elif name:
        _explain(chosen[0].model_dump(mode="json", exclude_none=True), chosen[0].title)
    else:
        _list_recipes(chosen)


def _list_recipes(chosen: list[Recipe]) -> None:
    table = console.table("Recipe", "Schemes", "Promise", "What it is")
    for recipe in chosen:
        promise = recipe.promise
        made_for = f"{promise.device}, {promise.context:,} tokens" if promise else ""
        table.add_row(
            recipe.name, ", ".join(_scheme_text(each) for each in recipe.schemes.values()), made_for, recipe.title
        )
    console.show(table)


def _scheme_text(scheme: RecipeScheme) -> str:
    group = f" g{scheme.group_size}" if scheme.group_size else f" {scheme.strategy.value}"
    if scheme.super_blocked:
        return f"{scheme.scale_dtype.value} {scheme.method.value}"
    kind = "int" if scheme.type.value == "int" else "fp"
    return f"{kind}{scheme.num_bits}{group} {scheme.method.value}"


def formats(name: ExplainedOption = None, as_json: AsJsonOption = False) -> None:
    """List the on-disk formats, or explain one: its tensors, and which runtimes read it.

    Example: `l4pack formats pack-quantized`
    """
    from l4pack.formats.known import format_names, load_format

    chosen = [load_format(each) for each in ([name] if name else format_names())]
    if as_json:
        console.show_json({"formats": [form.describe() for form in chosen]})
    elif name:
        _explain(chosen[0].describe(exclude_none=True), chosen[0].title)
    else:
        _list_formats(chosen)


def _list_formats(chosen: list[Format]) -> None:
    table = console.table("Format", "Bits", "Strategies", "Read by", "What it is")
    for form in chosen:
        readers = ", ".join(_reader_text(reader) for reader in form.readers)
        strategies = ", ".join(strategy.value for strategy in form.accepts.strategies)
        table.add_row(form.name, ", ".join(map(str, form.accepts.num_bits)), strategies, readers, form.title)
    console.show(table)


def _reader_text(reader: FormatReader) -> str:
    """A runtime, and the container that it reads the format's numbers from where that is another."""
    by_export = f" ({reader.container})" if reader.container else ""
    return f"{reader.runtime} {reader.version}{by_export}"


def _explain(value: dict[str, Any], title: str) -> None:
    import yaml

    console.show(f"[bold]{console.plain(title)}[/bold]", "")
    console.show_text(yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110))
