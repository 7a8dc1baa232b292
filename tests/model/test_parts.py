"""Llama 4's names are written down once: no module outside `l4pack/model/` spells one in a string."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "l4pack"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "model")
# Words that are names wherever they stand, and those that are only as a part of a dotted name.
NAME = re.compile(
    r"_proj(?![a-z_])|(?<![a-z_])(?:self_attn|feed_forward|shared_expert|lm_head|embed_tokens|language_model|vision_model"
    r"|multi_modal_projector|vision_adapter|(?:input|post_attention)_layernorm|layernorm_(?:pre|post)|class_embedding"
    r"|positional_embedding_vlm|patch_embedding|linear_1|fc[12])(?![a-z_])"
    r"|(?<![a-z_])(?:router|experts|layers)\\?\.(?! |$)|\.(?:router|experts|norm)(?![a-z_ ])|^(?:router|layernorm)$"
    r"|(?:^|[.*])layers\\?\.$|(?:^|\.)norm\.weight"
)


def strings(path):
    """Every string constant of a module but docstrings, those inside f-strings too, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_outside_spells_a_name(path):
    spelled = [(line, text) for line, text in strings(path) if NAME.search(text)]
    assert not spelled


def test_the_search_finds_names():
    for text in (
        "q_proj",
        "model.layers.0",
        "x.router",
        "router",
        "re:.*lm_head$",
        "layers.",
        "norm.weight",
        r"(gate|up|down)_proj",
        ".experts.",
    ):
        assert NAME.search(text), text
    for text in ("the router saw", "shared_expert_error", "experts", "layers", "of all layers.", "routed_expert"):
        assert not NAME.search(text), text
