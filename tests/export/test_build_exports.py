"""One `build` puts one solve into every runtime's files."""

from __future__ import annotations

import json

import pytest
import yaml
from exporting import MIX, recipe_of, with_merge
from licence_texts import LICENSE, USE_POLICY


def recipe_file(folder, recipe):
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)))
    return path


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory):
    folder = with_merge(checkpoint("scout"), tmp_path_factory.mktemp("build") / "source")
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "USE_POLICY.md").write_text(USE_POLICY)
    return folder


def test_one_build_serves_three_runtimes(source, tmp_path, l4pack):
    out = tmp_path / "out"
    asked = ("build", source, "--recipe", recipe_file(tmp_path, MIX), "--out", out, "--skip-evaluate")
    asked = (*asked, "--base-model", "meta-llama/Llama-4-Tiny", "--export", "gguf,mlx")
    ended = l4pack(*asked)
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "the same in all three" in said
    assert "images: llama.cpp puts the tokens" in " ".join(ended.err.split())
    again = json.loads(l4pack(*asked, "--json").out)["export"]
    assert again["outcome"] == "kept"
    for name, made in again["exports"].items():
        assert made["out"] == f"{out}-{name}"
        assert made["name"].endswith(f"-{name.upper()}")
        assert l4pack("licence", made["out"]).code == 0
        assert l4pack("verify", made["out"], "--against", out).code == 0


def test_what_does_not_fit_is_refused_before_it_is_solved(source, tmp_path, l4pack):
    recipe = recipe_file(tmp_path, recipe_of(routed_expert="fp8"))
    ended = l4pack("build", source, "--recipe", recipe, "--out", tmp_path / "out", "--export", "gguf")
    assert ended.code == 2
    assert "ggml has no type for FP8" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["onnx", "gguf,onnx", ","])
def test_another_container_is_named(source, tmp_path, named, l4pack):
    ended = l4pack("build", source, "--out", tmp_path / "out", "--export", named)
    assert ended.code == 2
    assert "no container is called" in ended.err
