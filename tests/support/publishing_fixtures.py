"""Fixtures for tests of packaging and pushing: a loopback Hub, and a tiny artifact with the texts of its licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import HubServer, running_hub
from licence_texts import LICENSE, USE_POLICY
from publishing import BASE, SECRET, made

from l4pack.publish.publish import Wishes, package_artifact


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's own cache and token; large files travel by LFS, not Xet; nobody waits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        server.tokens = {SECRET: {"me"}}
        server.part_bytes = 200_000
        # What HF_ENDPOINT sets when huggingface_hub is imported.
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        here = template.replace(huggingface_hub.constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="session")
def licensed_source(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 with the texts of its licence."""
    folder = tmp_path_factory.mktemp("licensed") / "Llama-4-Tiny"
    shutil.copytree(checkpoint("scout"), folder)
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "USE_POLICY.md").write_text(USE_POLICY)
    (folder / "README.md").write_text("---\nlanguage: [en, fr]\n---\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Llama4ImageProcessorFast"}))
    return folder


@pytest.fixture(scope="session")
def quantized(licensed_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(licensed_source, tmp_path_factory.mktemp("made") / "out", {})


@pytest.fixture
def unpackaged(quantized: Path, tmp_path: Path) -> Path:
    """An artifact, not packaged yet, that a test may change."""
    return Path(shutil.copytree(quantized, tmp_path / "out"))


@pytest.fixture(scope="session")
def packaged_once(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(quantized, tmp_path_factory.mktemp("packaged") / "out"))
    package_artifact(folder, None, Wishes(base_model=BASE))
    return folder


@pytest.fixture
def packaged(packaged_once: Path, tmp_path: Path) -> Path:
    """A packaged artifact that a test may change."""
    return Path(shutil.copytree(packaged_once, tmp_path / "out"))
