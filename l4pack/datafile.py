"""Reading YAML that people write: bounded, plain data only, and every mistake named by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from l4pack.errors import RecipeError

MAX_BYTES = 1_000_000
ModelT = TypeVar("ModelT", bound=BaseModel)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (which can blow up) and without repeated keys (which hide a mistake)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            problem = f"key '{min(repeated)}' appears twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError naming file and line."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}", hint="check the file's name") from error
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES:,} bytes", hint="is this the file you meant?")
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}, line {line}: {error.problem}", hint="mend the YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, AttributeError) as error:
        # PyYAML lets these through for tags that don't fit their value, such as `!!bool maybe`.
        raise RecipeError(f"{path}: not readable as YAML", hint="mend the YAML") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} does not hold keys and values", hint="start from a shipped file")
    return value


def validate(kind: type[ModelT], value: dict[str, Any], where: str) -> ModelT:
    """Check `value` against a schema. Raises RecipeError naming the first wrong key."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        message = first["msg"].removeprefix("Value error, ")
        known = ", ".join(kind.model_fields) if first["type"] == "extra_forbidden" and len(first["loc"]) == 1 else ""
        hint = f"known keys: {known}" if known else "see docs/reference/recipes.md"
        raise RecipeError(f"{where}: {key}: {message}", hint=hint) from None
