"""`l4pack verify`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.opening import opened_original
from l4pack.cli.options import (
    AgainstOption,
    AsJsonOption,
    AuditedOption,
    CompanionsOption,
    HeadersOnlyOption,
    LoraOption,
    SampleOption,
    SignatureOption,
    StrictOption,
)
from l4pack.errors import UsageError
from l4pack.units import human_bytes

if TYPE_CHECKING:
    from l4pack.export.prove import Proof
    from l4pack.verify.findings import Area, Finding
    from l4pack.verify.verify import Verification

_SHOWN_PLACES = 3


def verify(
    artifact: AuditedOption,
    against: AgainstOption = None,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    sample: SampleOption = None,
    headers_only: HeadersOnlyOption = False,
    signature: SignatureOption = None,
    strict: StrictOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Check an artifact: what runtimes would read, whether it is right, and with --against whether it is this model.

    Of a GGUF file that l4pack did not export, its header is checked: whether llama.cpp finds a Llama 4 in it, of the right sizes.

    A repository on the Hub is checked as it is published; with --headers-only, no weight of it is fetched. Exit code 0: nothing wrong. 1: something is. 4: the artifact or the source can't be opened.

    Example: `l4pack verify demo-int4 --against demo`
    """
    from l4pack.artifact.published import look
    from l4pack.cli.verify_gguf import holds_gguf, show_gguf
    from l4pack.containers.safetensors_folder import CONTAINER
    from l4pack.export.record import export_folder
    from l4pack.verify.verify import verify_artifact

    exported, gguf = export_folder(Path(artifact)), holds_gguf(Path(artifact))
    if headers_only and signature is not None:
        raise typer.BadParameter("reads not the bytes that are signed", param_hint="--headers-only")
    if gguf and (headers_only or exported is None):
        show_gguf(Path(artifact), against, signature, as_json=as_json, strict=strict)
        return
    if exported is not None:
        if headers_only:
            raise UsageError(
                f"{artifact} is an export", hint="it is held against its artifact: --against ARTIFACT, or --signature"
            )
        _verify_export(exported, against, signature, as_json)
        return
    if sample is not None and against is None:
        raise typer.BadParameter("needs --against", param_hint="--sample")
    if headers_only and against is not None:
        raise typer.BadParameter("reads nothing to hold against a source", param_hint="--headers-only")
    source = opened_original(against, companions, lora)
    with (
        look(artifact, weights=not headers_only, say=console.tell) as looked,
        console.progress("verifying", CONTAINER.weight_bytes(looked.folder)) as bar,
    ):
        result = verify_artifact(
            looked.folder, source, sample, bar.advance, headers_only=headers_only, signers=signature
        )
    passed = result.ok and not (strict and result.findings)
    if as_json:
        console.show_json(verification_record(result, passed=passed))
    else:
        console.show(*verification_view(looked.name, result, passed=passed))
    if not passed:
        raise typer.Exit(1)


def _verify_export(folder: Path, against: str | None, signers: Path | None, as_json: bool) -> None:
    """The same of an export, which is held against the artifact that it was made from, or against who signed it."""
    from l4pack.checkpoint.open import open_source
    from l4pack.export.check import check_export
    from l4pack.verify.checks_signature import check_signature
    from l4pack.verify.findings import Findings

    if against is None and signers is None:
        raise UsageError(f"{folder} is an export", hint="add --against and the artifact that it was made from")
    signed = Findings()
    if signers is not None:
        check_signature(folder, signers, signed)
    proof, faults = None, [(one.rule, one.where, one.message) for one in signed]
    if against is not None:
        result = check_export(folder, open_source(against))
        proof, faults = result.proof, [*faults, *((one.rule, one.where, one.message) for one in result.faults)]
    if as_json:
        findings = [{"where": where, "message": message, "rule": rule} for rule, where, message in faults]
        console.show_json(
            {
                "ok": not faults, "findings": findings, "against": against, "headers_only": False,
                "proof": None if proof is None else asdict(proof),
            }
        )  # fmt: skip
    else:
        console.show(*_export_view(folder, proof, faults, signed=signers is not None))
    if faults:
        raise typer.Exit(1)


def _export_view(
    folder: Path, proof: Proof | None, faults: list[tuple[str, str, str]], *, signed: bool
) -> list[RenderableType]:
    """What was checked of an export, for people."""
    name = f"[bold]{console.plain(folder)}[/bold]"
    if faults:
        return [
            f"{name}: [red]not verified[/red]",
            *(f"  {console.plain(where)}: {console.plain(message)}" for _, where, message in faults),
        ]
    said = ["every file is as one of the signers signed it"] if signed else []
    if proof is not None:
        more = f", {proof.rounded:,} rounded as asked" if proof.rounded else ""
        said.append(f"{proof.matrices:,} tensors read back by {proof.by}: each is the artifact's{more}")
    return [f"{name}: [green]verified[/green], {'; '.join(said)}"]


def verification_record(result: Verification, *, passed: bool) -> dict[str, object]:
    """A verification as JSON."""
    checked = result.checked
    return {
        "ok": passed,
        "findings": [asdict(finding) for finding in result.findings],
        "errors": result.errors,
        "warnings": len(result.findings) - result.errors,
        "against": result.against,
        "headers_only": result.headers_only,
        "checked": {
            "files": checked.files,
            "modules": checked.modules,
            "compared_sample_of": checked.sampled_of,
            **asdict(checked.tally),
        },
    }


def verification_view(name: str, result: Verification, *, passed: bool) -> list[RenderableType]:
    """A verification for people: the verdict, what was checked, and the findings grouped by rule."""
    warnings = len(result.findings) - result.errors
    verdict = "[green]verified[/green]" if passed else "[red]not verified[/red]"
    notes = [f"{count} {word}{'s' * (count != 1)}" for count, word in ((result.errors, "error"), (warnings, "warning"))]
    told = ", ".join(note for note in notes if not note.startswith("0 ")) or "nothing found"
    if not passed and not result.findings:
        told = "nothing could be checked"
    lines: list[RenderableType] = [f"[bold]{console.plain(name)}[/bold]: {verdict}, {told}", "", _checked_table(result)]
    for level, title in (("error", "[red]Errors[/red]"), ("warning", "[yellow]Warnings[/yellow]")):
        found = [finding for finding in result.findings if finding.level == level]
        if found:
            lines += ["", title, *_grouped(found)]
    return lines


def _checked_table(result: Verification) -> RenderableType:
    errors = Counter(finding.area for finding in result.findings if finding.level == "error")
    warnings = Counter(finding.area for finding in result.findings if finding.level == "warning")
    table = console.table("Checked", "What", ">Errors", ">Warnings")
    for area, what in _looked_at(result).items():
        table.add_row(area.value, what, _count(errors[area]), _count(warnings[area]))
    return table


def _looked_at(result: Verification) -> dict[Area, str]:
    from l4pack.verify.findings import Area

    checked, tally = result.checked, result.checked.tally
    rows = {
        Area.FILES: f"{checked.files:,} files",
        Area.CONFIGURATION: "config.json and its quantization_config",
        Area.TENSORS: f"{tally.tensors:,} tensors: names, dtypes, shapes",
        Area.IGNORE: f"{checked.modules:,} modules, as transformers, vLLM and SGLang match them",
        Area.VALUES: f"{tally.matrices:,} quantized matrices, {human_bytes(tally.bytes)} in all",
        Area.DIGESTS: f"{tally.digests:,} SHA-256 of the manifest" if tally.digests else "no manifest",
        Area.KEPT: "not asked for (--against SOURCE)",
        Area.WEIGHTS: "not asked for (--against SOURCE)",
    }
    if result.headers_only:
        rows |= dict.fromkeys((Area.VALUES, Area.DIGESTS), "not looked at (--headers-only)")
    if result.against is not None:
        lost = f"; {tally.kept_rounded:,} float32 numbers rounded to 16 bits" if tally.kept_rounded else ""
        rows[Area.KEPT] = f"{tally.kept_compared:,} tensors, bit for bit{lost}"
        rows[Area.WEIGHTS] = _compared(result)
    return rows


def _compared(result: Verification) -> str:
    from l4pack.verify.tally import SAMPLE_SEED

    checked, tally = result.checked, result.checked.tally
    sample = f" of {checked.sampled_of:,} (seed {SAMPLE_SEED})" if checked.sampled_of is not None else ""
    told = f"{tally.matrices_compared:,}{sample} matrices, {tally.within_half_step:,} within half a step"
    if tally.largest_error_ratio:
        told += f"; error at most {tally.largest_error_ratio:.2f} x rounding's"
    return told


def _count(count: int) -> str:
    return f"{count:,}" if count else "-"


def _grouped(findings: list[Finding]) -> list[RenderableType]:
    """One block a rule: what it means, how often, and the first places."""
    from rich.padding import Padding

    from l4pack.verify.findings import RULES

    lines: list[RenderableType] = []
    for rule in dict.fromkeys(finding.rule for finding in findings):
        same = [finding for finding in findings if finding.rule == rule]
        count = f" x {len(same):,}" if len(same) > 1 else ""
        lines.append(f"  [bold]{rule}[/bold]{count}: {RULES[rule][1]}")
        places = [
            f"{console.plain(finding.where)}: {console.plain(finding.message)}" for finding in same[:_SHOWN_PLACES]
        ]
        if len(same) > _SHOWN_PLACES:
            places.append(f"and {len(same) - _SHOWN_PLACES:,} more (--json lists all)")
        lines += [Padding(place, (0, 0, 0, 4), expand=False) for place in places]
    return lines
