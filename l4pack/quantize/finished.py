"""Whether a folder holds the very artifact that a plan would make: then nothing is done again."""

from __future__ import annotations

from pathlib import Path

from l4pack.artifact.contents import measured_digest, recorded_digest
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import ManifestFile, read_manifest
from l4pack.artifact.policy import written_files
from l4pack.checkpoint.companions import folder_files
from l4pack.checkpoint.parts import file_digest
from l4pack.checkpoint.sample import local_sample
from l4pack.checkpoint.source import open_folder
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.errors import UsageError
from l4pack.plan.plan import Plan


def is_finished(plan: Plan, out: Path) -> bool:
    """Whether `out` holds this artifact, whole; reads all of it.

    Raises UsageError when it holds anything else: another artifact, this one with bytes that are not as they were
    written, or one that was made of other weights. SourceError.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    sizes = folder_files(out, plan.checkpoint.included) if out.is_dir() else {}
    same = all(sizes.get(name) == size for name, size in plan.files.items())
    same = same and (out / CONTAINER.config_name).read_bytes() == plan.config_json
    if not same or not plan.manifest.describes((out / MANIFEST_NAME).read_bytes()):
        raise UsageError(f"{out} exists and is not this artifact", hint="choose another --out, or remove it yourself")
    manifest = read_manifest(out)
    _check_source(plan, manifest, out)
    changed = _changed(plan, manifest, out)
    if changed is not None:
        raise UsageError(
            f"{out} is this artifact, but {changed} is not as it was written",
            hint=f"remove it to make it again; l4pack verify {out} says what is wrong",
        )
    return True


def _check_source(plan: Plan, manifest: ManifestFile, out: Path) -> None:
    made_of = manifest.source.sample_sha256
    if made_of is not None and local_sample(plan.checkpoint) not in (None, made_of):
        raise UsageError(
            f"{out} exists and was made of {plan.checkpoint.name} when it had other weights",
            hint="choose another --out, or remove it yourself",
        )


def _changed(plan: Plan, manifest: ManifestFile, out: Path) -> str | None:
    """The first file that is not as the manifest says; what `package` writes may be."""
    for name, record in manifest.files.items():
        if name not in written_files() and file_digest(out / name) != record.sha256:
            return name
    for shard in plan.shards:
        with (out / shard.file).open("rb") as stream:
            if stream.read(len(shard.prefix)) != shard.prefix:
                return shard.file
    return None if measured_digest(open_folder(out)) == recorded_digest(out) else "a tensor"
