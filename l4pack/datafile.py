"""Reading files that people write, send or move: bounded, plain data only, and every mistake named by its key."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from l4pack.errors import RecipeError, SourceError, UsageError

MAX_BYTES = 1_000_000
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
LFS_MARK = b"version https://git-lfs.github.com/spec/v"
ModelT = TypeVar("ModelT", bound=BaseModel)
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBER_STARTS = "+-.0123456789"


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (which can blow up), without repeated keys (which hide a mistake), and with YAML 1.2's plain
    numbers: 1.1's base 60 makes a duration of `1:30` and takes quadratic time on a long one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            problem = f"key '{min(repeated)}' appears twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_PlainLoader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_constructor(_INT, _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor(_FLOAT, _PlainLoader.construct_yaml_float)
_PlainLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*$"), list(_NUMBER_STARTS))
_PlainLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list(_NUMBER_STARTS),
)


def parse_yaml(text: bytes | str) -> Any:
    """Plain data from YAML of bounded length. Raises yaml.YAMLError, ValueError or RecursionError, and nothing else."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (TypeError, LookupError, AttributeError) as error:
        # PyYAML lets these through for tags that don't fit their value, such as `!!bool maybe`.
        raise ValueError(str(error)) from error


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
        value = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}, line {line}: {error.problem}", hint="mend the YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not readable as YAML", hint="mend the YAML") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} does not hold keys and values", hint="start from a shipped file")
    return value


def parse_json(raw: bytes | str) -> Any:
    """Plain data from JSON. Raises ValueError, also for NaN, infinities, and nesting deeper than Python's own limit."""
    try:
        return json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_or_none(raw: bytes | str) -> Any:
    """Plain data from JSON; None for what is none, whose reader has its own word for that."""
    try:
        return parse_json(raw)
    except ValueError:
        return None


def small_object(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes; nothing where there is no such file, or something else in it."""
    if not path.is_file() or path.stat().st_size > most:
        return {}
    value = json_or_none(path.read_bytes())
    return value if isinstance(value, dict) else {}


def digest_of(value: Any) -> str:
    """Hex SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Where the first fault that a schema found lies, its keys joined by dots, and what it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")


def read_json(path: Path, most: int, hint: str) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises UsageError, with `hint`, for anything else."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(most + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint=hint) from error
    if len(raw) > most:
        raise UsageError(f"{path} is larger than {most:,} bytes", hint=hint)
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON", hint=hint) from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold an object", hint=hint)
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def validate(
    kind: type[ModelT],
    value: dict[str, Any],
    where: str,
    hint: str = "`l4pack recipes NAME` shows a shipped one with all keys",
) -> ModelT:
    """Check `value` against a schema. Raises RecipeError naming the first wrong key."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = first_fault(error)
        known = ", ".join(kind.model_fields) if first["type"] == "extra_forbidden" and len(first["loc"]) == 1 else ""
        raise RecipeError(
            f"{where}: {key or 'file'}: {message}", hint=f"known keys: {known}" if known else hint
        ) from None


def refuse_lfs_pointer(content: bytes, where: str) -> None:
    """Raise SourceError when `content` is the note that Git LFS leaves in place of a file it has not fetched."""
    if content.startswith(LFS_MARK):
        raise SourceError(
            f"{where} is a Git LFS pointer, not the file itself",
            hint="run `git lfs install` and `git lfs pull` in its folder, or download it with `hf download`",
        )
