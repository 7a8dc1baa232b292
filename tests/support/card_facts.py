"""What a card is made from, for a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from publishing import policy_named

from l4pack.artifact.manifest import Contents, Manifest
from l4pack.checkpoint.open import open_source
from l4pack.publish.card_facts import CardFacts
from l4pack.recipe import load_recipe

BASE = "meta-llama/Llama-4-Scout-17B-16E-Instruct"


NAME = "Llama-4-Scout-17B-16E-Instruct-W4A16-g128"


def facts(recipe: str = "scout-int4-1xh100", **changes: Any) -> CardFacts:
    source = open_source("llama-4-scout")
    manifest = json.loads(Manifest.of(source, load_recipe(recipe)).to_json(Contents()))
    files = {f"model-{i:05}-of-00014.safetensors": 4_633_000_000 for i in range(1, 15)} | {"config.json": 3000}
    made = CardFacts(NAME, policy_named("llama4"), manifest, source.config.raw, files, base_model=BASE)
    return replace(made, **changes)
