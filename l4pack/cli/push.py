"""`l4pack push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.options import (
    ArtifactOption,
    AsJsonOption,
    CollectionOption,
    DryRunOption,
    GatedOption,
    OfOption,
    OverwriteOption,
    PublicOption,
    PullRequestOption,
    RepositoryOption,
    RevisionOption,
    SignOption,
    TagOption,
)
from l4pack.units import human_bytes

if TYPE_CHECKING:
    from l4pack.export.publish import Export
    from l4pack.publish.upload import Destination, Uploaded, UploadPlan


def push(
    folder: ArtifactOption,
    repository: RepositoryOption,
    of: OfOption = None,
    public: PublicOption = False,
    revision: RevisionOption = "main",
    pull_request: PullRequestOption = False,
    tag: TagOption = None,
    collection: CollectionOption = None,
    gated: GatedOption = False,
    sign: SignOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Upload an artifact to the Hub, once verify, licence, gates and budget pass; then compare every digest.

    An export (GGUF, MLX) too, with `--of` and its artifact. The same command goes on after any interruption. The token is the one `hf auth login` or HF_TOKEN gives.

    `--sign` signs after the repository is in the card, so that the signature is of what is sent.

    Example: `l4pack push scout-int4 my-org/Llama-4-Scout-17B-16E-Instruct-W4A16-g128-mixed --dry-run`
    """
    from l4pack.export.publish import find_export
    from l4pack.publish.publish import address_card, plan_push, sign_artifact, who_pushes
    from l4pack.publish.upload import Destination

    export = find_export(folder, of)
    names = None if export is None else export.names
    target = Destination(repository, revision, public, pull_request, overwrite, gated, tag, collection)
    ready = [*_check(folder, target, export), f"account: {who_pushes(target)}"]
    if not dry_run:
        address_card(folder, repository)
        if sign is not None:
            sign_artifact(folder, sign, names)
    plan = plan_push(folder, target, names)
    if not as_json:
        (console.show if dry_run else console.talk)(*plan_view(plan, ready))
    done = None if dry_run else _upload(plan)
    if as_json:
        console.show_json({"ready": ready, **push_record(plan, done)})
    elif done is not None:
        console.show(*done_view(plan, done))


def _check(folder: Path, target: Destination, export: Export | None) -> list[str]:
    from l4pack.containers.safetensors_folder import CONTAINER
    from l4pack.export.publish import check_export_ready
    from l4pack.publish.publish import check_ready

    if export is not None:
        console.talk("verifying: every weight is read back and compared with the artifact's")
        return check_export_ready(export, target.repo_id.rpartition("/")[2], gated=target.gated)
    with console.progress("verifying", CONTAINER.weight_bytes(folder)) as bar:
        return check_ready(folder, target.repo_id.rpartition("/")[2], gated=target.gated, advance=bar.advance)


def _upload(plan: UploadPlan) -> Uploaded:
    from l4pack.publish.publish import push_artifact

    with console.progress("uploading", plan.send_bytes) as bar:
        return push_artifact(plan, advance=bar.advance)


def push_record(plan: UploadPlan, done: Uploaded | None) -> dict[str, Any]:
    """A push as JSON; `commit` is null for a dry run."""
    return {
        "repository": plan.target.repo_id,
        "revision": plan.target.revision,
        "private": plan.private,
        "creates_repository": not plan.exists,
        "send_bytes": plan.send_bytes,
        "files": [{"name": step.name, "bytes": step.size, "action": step.action.value} for step in plan.steps],
        "left_behind": list(plan.left_behind),
        "commit": done.commit if done else None,
        "url": done.url if done else None,
        "pull_request": done.pull_request if done else None,
    }


def plan_view(plan: UploadPlan, ready: list[str]) -> list[RenderableType]:
    """What a push will do, for people."""
    from l4pack.publish.upload import FileChange

    target = plan.target
    table = console.table("File", ">Size", "What happens")
    for step in plan.steps:
        table.add_row(console.plain(step.name), human_bytes(step.size), step.action.value)
    repository = "a pull request to" if target.pull_request else "branch" if plan.exists else "a new repository, branch"
    visible = "private" if plan.private else "[yellow]public[/yellow]"
    where = f"{repository} {console.plain(target.revision)} of [bold]{console.plain(target.repo_id)}[/bold], {visible}"
    replaced = len(plan.names(FileChange.REPLACE)) + len(plan.names(FileChange.DELETE))
    counts = f"{human_bytes(plan.send_bytes)} to send, {replaced} files replaced or deleted"
    left = f"left here: {console.plain(', '.join(plan.left_behind))}" if plan.left_behind else ""
    return [*(console.plain(line) for line in ready), "", where, "", table, "", counts, *([left] if left else [])]


def done_view(plan: UploadPlan, done: Uploaded) -> list[str]:
    """What a push did, for people."""
    from l4pack.publish.upload import FileChange

    kept = len(plan.names(FileChange.KEEP))
    lines = [
        f"[bold]{console.plain(done.pull_request or done.url)}[/bold] at commit {done.commit}",
        f"{done.files} files sent, {kept} were there already; every digest agrees",
    ]
    reader = f"l4pack licence {plan.target.repo_id}"
    return [*lines, f"next: {console.plain(reader)}"]
