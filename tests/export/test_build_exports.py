"""One `build` puts one solve into every runtime's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from exporting import MIX, with_merge

pytest_plugins = ["publishing_fixtures"]
pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


def recipe_file(folder, recipe):
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
    return path


@pytest.fixture(scope="module")
def source(licensed_source, tmp_path_factory):
    return with_merge(licensed_source, tmp_path_factory.mktemp("build") / "Llama-4-Tiny")


def test_one_build_serves_three_runtimes_and_sends_all_to_the_hub(source, tmp_path, l4pack, hub):
    out = tmp_path / "out"
    asked = ("build", source, "--recipe", recipe_file(tmp_path, MIX), "--out", out, "--skip-evaluate")
    asked = (*asked, "--base-model", "meta-llama/Llama-4-Tiny", "--export", "gguf,mlx")
    ended = l4pack(*asked)
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "the same in all three" in said
    assert "images: llama.cpp puts the tokens" in " ".join(ended.err.split())
    again = json.loads(l4pack(*asked, "--json").out)
    assert again["export"]["outcome"] == "kept"
    repository = f"me/{again['package']['name']}"
    ended = l4pack(*asked, "--push", repository, "--json")
    assert ended.code == 0, ended.err
    assert set(hub.repos) == {repository, f"{repository}-GGUF", f"{repository}-MLX"}
    pushed = json.loads(ended.out)["push"]["exports"]
    for name, made in again["export"]["exports"].items():
        sent = hub.repos[f"{repository}-{name.upper()}"].files("main")
        own = {path.name: path.read_bytes() for path in Path(made["out"]).iterdir()}
        assert {file: blob.content for file, blob in sent.items() if file != ".gitattributes"} == own
        assert pushed[name]["url"].endswith(f"{repository}-{name.upper()}")
        assert f"{repository}-{name.upper()}" in own["README.md"].decode()
        assert made["out"] == f"{out}-{name}"
        assert made["name"].endswith(f"-{name.upper()}")
        assert l4pack("licence", made["out"]).code == 0
        assert l4pack("verify", made["out"], "--against", out).code == 0


@pytest.mark.parametrize(
    ("recipe", "says"), [("fp8", "ggml has no type for FP8"), ("nvfp4", "ignores the global scales of NVFP4")]
)
def test_what_does_not_fit_is_refused_before_it_is_solved(source, tmp_path, recipe, says, l4pack):
    """Rounded or calibrated."""
    ended = l4pack("build", source, "--recipe", recipe, "--out", tmp_path / "out", "--export", "gguf")
    assert ended.code == 2
    assert says in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["onnx", "gguf,onnx", ","])
def test_another_container_is_named(source, tmp_path, named, l4pack):
    ended = l4pack("build", source, "--out", tmp_path / "out", "--export", named)
    assert ended.code == 2
    assert "no container is called" in ended.err
