"""Adapters from the Hub, over real HTTP against a loopback Hub: onto a model from there too, shard by shard."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
from adapters import pair, write
from hub_repository import REPO, own_cache  # noqa: F401
from hub_server import running_hub
from safetensors.torch import load_file
from small_checkpoint import checkpoint_files

from l4pack.artifact.manifest_schema import read_manifest
from l4pack.checkpoint.open import open_source
from l4pack.errors import SourceError
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

ADAPTER = "someone/Llama-mine"


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as server:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        here = template.replace(huggingface_hub.constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        server.add(REPO, checkpoint_files())
        yield server


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_from_the_hub(hub, tmp_path):
    folder = write(tmp_path / "mine", pair("base_model.model.language_model.model.layers.0.self_attn.q_proj", 32, 32))
    hub.add(ADAPTER, files_of(folder))
    base = tmp_path / "base"
    base.mkdir()
    for name, content in checkpoint_files().items():
        (base / name).write_bytes(content)
    made = {}
    for name, source, adapter, fetched in (
        ("hub", REPO, ADAPTER, tmp_path / "fetched"),
        ("here", str(base), str(folder), None),
    ):
        opened = open_source(source, lora=[adapter], fetch_folder=fetched)
        made[name] = run_plan(make_plan(opened, load_recipe("fp8")), tmp_path / name).out
    one, other = (load_file(out / "model.safetensors") for out in made.values())
    assert all(one[name].float().equal(other[name].float()) for name in one | other)
    (record,) = read_manifest(made["hub"]).source.adapters
    assert (record.repository, record.revision) == (ADAPTER, hub.repos[ADAPTER].refs["main"])
    assert record.sha256 == read_manifest(made["here"]).source.adapters[0].sha256
    assert not list((tmp_path / "fetched").glob("*.safetensors"))


def test_a_repository_that_holds_none(hub):
    hub.add(ADAPTER, {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
    with pytest.raises(SourceError, match="a pickle"):
        open_source(REPO, lora=[ADAPTER])
    assert hub.served("adapter_model") == 0
