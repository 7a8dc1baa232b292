"""`l4pack package`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.cli import console
from l4pack.cli.options import (
    ArtifactOption,
    AsJsonOption,
    BaseModelOption,
    CompanionsOption,
    FamilyOption,
    GatedOption,
    NameOption,
    OfOption,
    OriginalSourceOption,
    SignOption,
    TemplateOption,
)

if TYPE_CHECKING:
    from l4pack.publish.publish import Packaged


def package(
    folder: ArtifactOption,
    of: OfOption = None,
    name: NameOption = None,
    source: OriginalSourceOption = None,
    companions: CompanionsOption = None,
    base_model: BaseModelOption = None,
    template: TemplateOption = None,
    gated: GatedOption = False,
    family: FamilyOption = None,
    sign: SignOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Complete an artifact's folder for publication: licence, notice, model card and name, all checked.

    The folder of an export (GGUF, MLX) too: `l4pack package scout-gguf --of scout-int4` after the artifact itself.

    Example: `l4pack package scout-int4 --base-model meta-llama/Llama-4-Scout-17B-16E-Instruct`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.export.publish import find_export, package_export
    from l4pack.publish.family import rungs
    from l4pack.publish.publish import Wishes, package_artifact, sign_artifact

    export = find_export(folder, of)
    original = None if source is None else open_original(source, companions=companions, requantize=True)
    others = rungs(family or (), of or folder, console.tell)
    wishes = Wishes(name=name, base_model=base_model, template=template, gated=gated, family=others)
    result = package_artifact(folder, original, wishes) if export is None else package_export(export, original, wishes)
    if sign is not None:
        sign_artifact(folder, sign, None if export is None else export.names)
    if as_json:
        console.show_json(package_record(result))
    else:
        console.show(*package_view(folder, result, of))


def package_record(result: Packaged) -> dict[str, object]:
    """What packaging did, as JSON."""
    return {
        "name": result.name,
        "written": list(result.written),
        "licence": result.audit.record(),
        "gates_missed": list(result.missed),
    }


def package_view(folder: Path, result: Packaged, of: Path | None = None) -> list[str]:
    """What packaging did, for people."""
    wrote = ", ".join(result.written) or "nothing: all of it was there"
    lines = [
        f"[bold]{console.plain(result.name)}[/bold]",
        f"wrote    {console.plain(wrote)}",
        f"licence  {result.audit.policy.title}, {result.audit.duties} duties met",
    ]
    if result.missed:
        missed = console.plain(", ".join(result.missed))
        return [*lines, f"gates    [red]missed[/red]: {missed}; the card says so, and push refuses the artifact"]
    beside = f" --of {console.plain(of)}" if of else ""
    where = f"{console.plain(folder)} ORGANISATION/{console.plain(result.name)}"
    return [*lines, f"next: l4pack push {where}{beside} --dry-run"]
