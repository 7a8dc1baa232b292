"""Recipes: frozen data that says, by tensor role, which scheme each matrix gets. Unknown keys are refused."""

from __future__ import annotations

from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.datafile import digest_of, read_yaml, validate
from l4pack.errors import RecipeError, UsageError
from l4pack.formats.configuration import OBSERVED, Activations
from l4pack.formats.known import load_format
from l4pack.model.tensors import QUANTIZABLE, Role
from l4pack.quant.grid import ScaleDtype
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.resources import data_folder

KEEP = "keep"
KV_CACHE = "kv_cache"  # what scales of the KV cache have in place of a scheme
MAX_EXTENDS = 8
CALIBRATION_OPTIONS = {"samples": "--calibration-samples", "sequence_length": "--sequence-length", "seed": "--seed"}
"""The options that change numbers of a recipe's calibration."""


class Method(StrEnum):
    """How the levels are chosen."""

    RTN = "rtn"
    GPTQ = "gptq"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GptqOptions(_Data):
    """How GPTQ solves a matrix: `dampening` is a fraction of the Hessian's mean diagonal; `sweeps` of coordinate descent
    follow, in which every column may change its level once all others are known.

    `asymmetric` is the share of the mismatch between the original model's inputs and the quantized one's that the
    weights make up for: 0 walks the quantized model alone, 1 aims at the original layer's own output.

    `two_sided` weighs errors by what they do to the model's end, which is known once it was walked back: each output by the
    second moments of its gradients, to whose diagonal `output_dampening` times the mean is added.
    """

    act_order: bool = True
    dampening: Annotated[float, Field(gt=0, le=1)] = 0.01
    sweeps: Annotated[int, Field(ge=0, le=32)] = 0
    asymmetric: Annotated[float, Field(ge=0, le=1)] = 1.0
    two_sided: bool = False
    output_dampening: Annotated[float, Field(gt=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _outputs_are_weighed(self) -> GptqOptions:
        if not self.two_sided and self.output_dampening != GptqOptions.model_fields["output_dampening"].default:
            raise ValueError(
                "output_dampening: it is for two_sided, which this is not; add 'two_sided: true', or leave it out"
            )
        return self


class RecipeScheme(Scheme):
    """A scheme as a recipe writes it: the numbers, the format that holds them, and the method that finds them."""

    format: str
    method: Method = Method.RTN
    gptq: GptqOptions | None = None
    activations: Activations = Activations.NONE

    @model_validator(mode="before")
    @classmethod
    def _gptq_has_options(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") == Method.GPTQ:
            return {**values, "gptq": values.get("gptq") or {}}
        return values

    @model_validator(mode="after")
    def _method_fits(self) -> RecipeScheme:
        if self.method is Method.GPTQ and self.strategy is Strategy.TENSOR:
            raise ValueError(
                "method: gptq solves no scheme with one scale a matrix, which runtimes change where they hold gate and up "
                "in one; take strategy channel or block, or method rtn"
            )
        if self.method is not Method.GPTQ and self.gptq is not None:
            raise ValueError("gptq: its options are for method gptq")
        if self.activations is Activations.STATIC_TENSOR and self.strategy is not Strategy.TENSOR:
            raise ValueError(
                "activations: static_tensor goes with strategy tensor; no runtime reads another for experts"
            )
        return self

    @property
    def observed(self) -> bool:
        """Whether inputs are rounded with a scale that is fixed beforehand."""
        return self.activations in OBSERVED

    @property
    def calibrated(self) -> bool:
        """Whether a text must be run through the model to find the numbers."""
        return self.method is Method.GPTQ or self.observed


class Rule(_Data):
    """Tensors by role, and by layer if need be, and the scheme they get."""

    roles: list[Role] | Literal["all"]
    layers: Annotated[list[int], Field(min_length=1)] | None = None
    scheme: str

    def matches(self, role: Role, layer: int | None, num_layers: int) -> bool:
        """Whether the rule speaks of a tensor; negative layers count from the last one."""
        if self.roles != "all" and role not in self.roles:
            return False
        if self.layers is None:
            return True
        return layer in {number % num_layers for number in self.layers if -num_layers <= number < num_layers}


class Gates(_Data):
    """The least accuracy an artifact must keep."""

    max_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    max_perplexity_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None


class Calibration(_Data):
    """The text that calibrated methods look at, and what is asked of it.

    At most `samples` sequences of `sequence_length` tokens (None: 2048, or the model's context if that is shorter) are
    taken. An expert that sees fewer than `min_tokens` of them borrows others. `max_cold_experts` is the share of routed
    experts that may see none, `max_fallbacks` the share of matrices that may end rounded to nearest. The walk back of
    two-sided schemes looks at the first `gradient_samples` of the sequences.
    """

    samples: Annotated[int, Field(gt=0)] = 256
    sequence_length: Annotated[int, Field(ge=2)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    min_tokens: Annotated[int, Field(ge=1)] = 1024
    max_cold_experts: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_fallbacks: Annotated[float, Field(ge=0, le=1)] = 0.05
    gradient_samples: Annotated[int, Field(gt=0)] = 64


class KVStrategy(StrEnum):
    """How many keys, or values, of a layer's cache share a scale: all of them, or those of one head."""

    TENSOR = "tensor"
    HEAD = "head"


class KVCache(_Data):
    """A KV cache that a runtime keeps in FP8 (E4M3), with scales found by calibration."""

    dtype: Literal["fp8"]
    strategy: KVStrategy = KVStrategy.TENSOR


class Promise(_Data):
    """What a recipe was made for: checked when the artifact is built."""

    model: str
    device: str
    context: Annotated[int, Field(gt=0)]
    sequences: Annotated[int, Field(gt=0)] = 1
    kv_dtype: Literal["bfloat16", "fp8"] = "bfloat16"
    gates: Gates = Gates()


class Recipe(_Data):
    """A whole recipe with every default filled in."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    title: str
    schemes: Annotated[dict[str, RecipeScheme], Field(min_length=1)]
    rules: Annotated[list[Rule], Field(min_length=1)]
    kv_cache: KVCache | None = None
    keep_float32: bool = False
    calibration: Calibration | None = None
    promise: Promise | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        calibrated = [f"schemes.{name}" for name, scheme in self.schemes.items() if scheme.calibrated]
        calibrated += [] if self.kv_cache is None else [KV_CACHE]
        if calibrated and self.calibration is None:
            raise ValueError(f"calibration: missing, and {calibrated[0]} needs one ({{}} takes the defaults)")
        if self.calibration is not None and not calibrated:
            raise ValueError("calibration: no scheme needs one, and neither does a kv_cache")
        if KEEP in self.schemes:
            raise ValueError(f"schemes: '{KEEP}' is the name for leaving tensors as they are")
        if KV_CACHE in self.schemes:
            raise ValueError(f"schemes: '{KV_CACHE}' is the name for scales of the KV cache")
        for number, rule in enumerate(self.rules):
            self._check_rule(rule, f"rules.{number}")
        unused = set(self.schemes) - {rule.scheme for rule in self.rules}
        if unused:
            raise ValueError(f"schemes.{min(unused)}: no rule uses it")
        return self

    def _check_rule(self, rule: Rule, where: str) -> None:
        if rule.scheme == KEEP:
            return
        if rule.scheme not in self.schemes:
            raise ValueError(
                f"{where}.scheme: '{rule.scheme}' is not one of schemes: {', '.join(self.schemes)}, {KEEP}"
            )
        if rule.roles == "all":
            raise ValueError(f"{where}.roles: 'all' takes scheme '{KEEP}' only; name the roles to quantize")
        if self.schemes[rule.scheme].observed and Role.ATTENTION in rule.roles:
            raise ValueError(
                f"{where}.roles: fixed scales of inputs are found for MLPs alone; "
                "keep attention, or give it a scheme whose inputs have none"
            )
        gptq = self.schemes[rule.scheme].gptq
        if gptq is not None and gptq.two_sided and Role.ATTENTION in rule.roles:
            raise ValueError(
                f"{where}.roles: two_sided carries gradients back through MLPs alone; "
                "give attention a scheme of its own without it"
            )
        fixed = [role.value for role in rule.roles if role not in QUANTIZABLE]
        if fixed:
            raise ValueError(f"{where}.roles: no runtime reads a quantized {fixed[0]}; give it scheme '{KEEP}'")

    def rule_for(self, role: Role, layer: int | None, num_layers: int) -> int | None:
        """Index of the rule that decides a tensor, or None when no rule speaks of it; the first match wins."""
        for number, rule in enumerate(self.rules):
            if rule.matches(role, layer, num_layers):
                return number
        return None

    def calibrating(self, text: bool = False, **changes: int | None) -> Recipe:
        """The recipe with some of its calibration's numbers changed (None: not). Raises UsageError if it has none."""
        given = {key: value for key, value in changes.items() if value is not None}
        if not given and not text:
            return self
        if self.calibration is None:
            option = CALIBRATION_OPTIONS[next(iter(given))] if given else "--calibration"
            raise UsageError(
                f"recipe {self.name} needs no calibration, {option} means nothing to it", hint="leave the option out"
            )
        values = {**self.calibration.model_dump(), **given}
        return self.model_copy(update={"calibration": validate(Calibration, values, "calibration")})

    def keeping(self, *, float32: bool) -> Recipe:
        """The recipe, with float32 kept where that is asked for."""
        return self.model_copy(update={"keep_float32": True}) if float32 else self

    def with_scales(self, dtype: str) -> Recipe:
        """The recipe with scales in a float dtype where it leaves that to the source."""
        schemes = {
            name: scheme.model_copy(update={"scale_dtype": ScaleDtype(dtype)})
            if scheme.scale_dtype is ScaleDtype.SOURCE
            else scheme
            for name, scheme in self.schemes.items()
        }
        return self.model_copy(update={"schemes": schemes})

    def digest(self) -> str:
        """Hex SHA-256 of the recipe with every default filled in."""
        return digest_of(self.model_dump(mode="json"))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in data_folder("recipes").glob("*.yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or one from a YAML file. Raises RecipeError naming the wrong key."""
    path = _recipe_path(name_or_file)
    values = _resolved(path, depth=0)
    recipe = validate(Recipe, values, path.name)
    for key, scheme in recipe.schemes.items():
        load_format(scheme.format).check_accepts(scheme, scheme.activations, f"{path.name}: schemes.{key}")
    return recipe


def _recipe_path(name_or_file: str) -> Path:
    if name_or_file in recipe_names():
        return data_folder("recipes") / f"{name_or_file}.yaml"
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    close = get_close_matches(name_or_file, recipe_names(), n=3, cutoff=0.4) or recipe_names()
    raise RecipeError(
        f"no recipe is named '{name_or_file}'", hint=f"did you mean {' or '.join(close)}? or give a .yaml file"
    )


def _resolved(path: Path, depth: int) -> dict[str, Any]:
    values = read_yaml(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if depth >= MAX_EXTENDS:
        raise RecipeError(f"{path.name}: extends: more than {MAX_EXTENDS} recipes deep", hint="is there a circle?")
    if parent not in recipe_names():
        hint = f"shipped recipes: {', '.join(recipe_names())}"
        raise RecipeError(f"{path.name}: extends: no shipped recipe is named '{parent}'", hint=hint)
    inherited = _resolved(data_folder("recipes") / f"{parent}.yaml", depth + 1)
    inherited.pop("promise", None)
    return {**inherited, **values}
