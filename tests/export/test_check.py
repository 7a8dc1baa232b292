"""`verify` of an export: held against its artifact, damaged in every way, with a header made to hurt."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
from conftest import quick_plan
from exporting import MIX, recipe_of

from l4pack.checkpoint.open import open_source
from l4pack.export.known import target_named
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.quantize.run import run_plan


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    place = tmp_path_factory.mktemp("check")
    artifact = run_plan(quick_plan(checkpoint("text"), MIX), place / "artifact").out
    outs = {}
    for name in ("gguf", "mlx"):
        plan = plan_export(open_source(str(artifact)), target_named(name), split=300_000)
        outs[name] = run_export(plan, place / name).out
    return artifact, outs


@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_an_export_is_verified(exported, name, l4pack):
    artifact, outs = exported
    ended = l4pack("verify", outs[name], "--against", artifact)
    assert ended.code == 0, ended.err
    assert "each is the artifact's" in " ".join(ended.out.split())
    file = next(path for path in outs[name].iterdir() if path.suffix in (".gguf", ".safetensors"))
    found = json.loads(l4pack("verify", file, "--against", artifact, "--json").out)
    assert (found["ok"], found["findings"]) == (True, [])


def test_it_wants_the_artifact(exported, l4pack):
    ended = l4pack("verify", exported[1]["gguf"])
    assert ended.code == 2
    assert "--against" in ended.err


def spoiled(change):
    """Change the first bytes of the largest part, or some of it."""

    def spoil(folder):
        path = max(folder.glob("*.gguf"), key=lambda one: one.stat().st_size)
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    return spoil


def more_than_there_is(raw):
    raw[8:24] = struct.pack("<QQ", 2**60, 2**60)


def one_byte(raw):
    raw[-3000] ^= 1


DAMAGE = {
    "a byte of a tensor": (spoiled(one_byte), "is not in the export as it is in the artifact"),
    "a header that claims 2^60 tensors": (spoiled(more_than_there_is), "is not what this version"),
    "a file cut short": (spoiled(lambda raw: raw.__delitem__(slice(-500, None))), "the artifact makes"),
    "a part that is missing": (lambda folder: max(folder.glob("*.gguf")).unlink(), "is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(exported, tmp_path, name, l4pack):
    artifact, outs = exported
    folder = shutil.copytree(outs["gguf"], tmp_path / "out")
    spoil, message = DAMAGE[name]
    spoil(folder)
    ended = l4pack("verify", folder, "--against", artifact, "--json")
    assert ended.code == 1
    assert message in json.loads(ended.out)["findings"][0]["message"]


def test_another_artifacts_export_is_told(exported, checkpoint, tmp_path, l4pack):
    other = run_plan(quick_plan(checkpoint("text"), recipe_of(routed_expert="int4-g32")), tmp_path / "other").out
    ended = l4pack("verify", exported[1]["gguf"], "--against", other)
    assert ended.code == 1
    assert "not verified" in ended.out


def test_a_record_that_is_none_is_refused(exported, tmp_path, l4pack):
    folder = shutil.copytree(exported[1]["gguf"], tmp_path / "out")
    (folder / "l4pack-export.json").write_text('{"container": 7}')
    assert l4pack("verify", folder, "--against", exported[0]).code == 2
