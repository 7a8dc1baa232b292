"""The work of whole jobs, as stages that follow one another: from a plan, or from what is to be compared or measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from l4pack.checkpoint.source import Checkpoint
from l4pack.model.config import TextConfig
from l4pack.model.names import classify
from l4pack.model.parts import WEIGHT, attention_shapes
from l4pack.model.tensors import QUANTIZABLE, Role, catalogue
from l4pack.plan.assign import Action, Target
from l4pack.plan.memory import STORED, mlp_numbers
from l4pack.plan.needs import DEFAULT_LENGTH
from l4pack.plan.plan import Plan
from l4pack.quant.dtypes import FLOATS
from l4pack.recipe import RecipeScheme
from l4pack.stream.rows import LAYERS_KEPT
from l4pack.timing.counts import (
    FLOAT,
    Tokens,
    attending,
    product,
    rounding,
    running_mlp,
    scoring,
    seeing,
    solving_attention,
    solving_mlp,
)
from l4pack.timing.work import Kind, Work
from l4pack.work.device import CPU

HIDDEN_WRITTEN = 2  # times a layer's hidden states go to disk: what attention adds to, and what the layer gives
SYNCS_A_LAYER = 2  # the same of a walk: of hidden states, and of the state that says which layer is done
# Forward passes that the way down is: attention's own, and with its derivative; of an MLP, whose outputs are not needed, two
# of three products forward and all three back. The head's products: for each row's sum, its label, and the gradient.
ATTENTION_DOWN, MLP_DOWN, HEAD_PRODUCTS = 3, 5 / 3, 3
SYNCS_A_UNIT = 2  # waits for the disk: of the shards, and of the journal
SAMPLE_ROWS, SAMPLED_SHARE = (
    2048,
    4,
)  # tokens of a layer that an evaluation compares units on: at most, and one of so many


@dataclass(frozen=True)
class Units:
    """The MLPs of one role: how many a model has, and their inner width."""

    count: int
    inner: int


def mlps_of(text: TextConfig) -> dict[Role, Units]:
    """A model's MLPs by role."""
    moe, layers = len(text.moe_layers), text.num_hidden_layers
    found = {
        Role.DENSE_MLP: Units(layers - moe, text.intermediate_size_mlp),
        Role.SHARED_EXPERT: Units(moe, text.intermediate_size),
        Role.ROUTED_EXPERT: Units(moe * text.num_local_experts, text.intermediate_size),
    }
    return {role: units for role, units in found.items() if units.count}


def tokens_of(text: TextConfig, role: Role, tokens: float) -> float:
    """How many tokens go through an MLP of a role: its share, of an expert."""
    return tokens * text.num_experts_per_tok / text.num_local_experts if role is Role.ROUTED_EXPERT else tokens


def starting(*, models: bool) -> Work:
    """Loading libraries: the kernels, and what runs models if they run."""
    work = Work()
    work.add("starting", Kind.KERNELS, 1)
    work.add("starting", Kind.LIBRARIES, int(models))
    return work


def rounding_tasks(plan: Plan) -> Work:
    """What needs no text: reading, rounding, copying, writing."""
    work = Work()
    for task in plan.tasks:
        work.add("rounding", Kind.READ, task.read_bytes)
        work.add("rounding", Kind.WRITE, task.write_bytes)
        work.add("rounding", Kind.HASH, task.write_bytes)
        if task.action is Action.QUANTIZE:
            rows = task.rows[1] - task.rows[0]
            for target in task.targets:
                work.include(rounding(plan.recipe.schemes[target.scheme], rows * target.linear.in_features))
    return work


def quantizing(plan: Plan, device: str = CPU, tokens: int | None = None) -> list[Work]:
    """A plan's job on a kind of device, calibrated on `tokens` (those of the plan unless given)."""
    stages = [starting(models=plan.needs is not None), rounding_tasks(plan)]
    if plan.needs is not None and plan.needs.gradient is not None:
        stages.append(walking_back(plan, device, tokens))
    if plan.needs is not None:
        stages.append(calibrating(plan, device, plan.needs.tokens if tokens is None else tokens))
        stages[-1].include(seeing(plan.checkpoint.config, plan.tiles))
    return stages


def walking_back(plan: Plan, device: str, tokens: int | None = None) -> Work:
    """Of a two-sided plan, calibrated on so many tokens if those are fewer than the walk back looks at: once up through the
    model, and once down."""
    assert plan.needs is not None
    assert plan.needs.gradient is not None
    text, weights, back = plan.checkpoint.config.text, layer_weights(plan.checkpoint), plan.needs.gradient.tokens
    back = back if tokens is None else min(tokens, back)
    return up_and_down(text, weights, back, calibration_length(plan), device)


def up_and_down(
    text: TextConfig, weights: LayerWeights, tokens: int, length: int, device: str, gradients: int = 1
) -> Work:
    """Once up through the model, and once down with so many gradients."""
    found = Work()
    for _, kind, amount in _up_and_down(text, weights, tokens, length, device, gradients).items():
        found.add("walk back", kind, amount)
    return found


def _up_and_down(
    text: TextConfig, weights: LayerWeights, tokens: int, length: int, device: str, gradients: int
) -> Work:
    layers, row, phase = text.num_hidden_layers, tokens * text.hidden_size, ""
    work = running(text, tokens, length, Kind.TENSOR, device)
    work.include(attending(text, tokens, length, Kind.TENSOR, device), (1 + (ATTENTION_DOWN - 1) * gradients) * layers)
    for role, units in mlps_of(text).items():
        down = running_mlp(text, units.inner, tokens_of(text, role, tokens), Kind.TENSOR, phase, device)
        work.include(down, MLP_DOWN * gradients * units.count)
    work.add(phase, Kind.TENSOR, layers * product(text.hidden_size, row, 1))
    work.add(phase, Kind.TENSOR, HEAD_PRODUCTS * product(row, text.vocab_size, 1))
    work.add(phase, Kind.LOGITS, 2 * tokens * text.vocab_size)
    work.include(weights.loading(2))
    written = row * STORED + (1 + gradients) * HIDDEN_WRITTEN * row * FLOAT + text.hidden_size**2 * FLOAT
    work.add(phase, Kind.WRITE, layers * written)
    work.add(phase, Kind.SYNC, 2 * SYNCS_A_LAYER * layers)
    return work


def calibrating(plan: Plan, device: str, tokens: int) -> Work:
    """The walk through all layers in every stream, and solving on the way."""
    assert plan.needs is not None
    text, streams = plan.checkpoint.config.text, plan.needs.streams
    work = Work()
    work.include(running(text, tokens, calibration_length(plan), Kind.TENSOR, device), streams)
    for (role, scheme), count in _solved(plan).items():
        work.include(solving(plan, role, plan.recipe.schemes[scheme], device, tokens), count)
    work.include(_loading(plan))
    work.include(_written(plan.calibrated, sum(_solved(plan).values())))
    hidden = streams * tokens * text.hidden_size * FLOAT * text.num_hidden_layers
    work.add("writing", Kind.WRITE, hidden * (1 / LAYERS_KEPT if plan.needs.resident else HIDDEN_WRITTEN))
    return work


def solving(plan: Plan, role: Role, scheme: RecipeScheme, device: str, tokens: int) -> Work:
    """Solving one layer's attention, or one MLP of a role; an expert with few tokens borrows some."""
    assert plan.recipe.calibration is not None
    assert plan.needs is not None
    text = plan.checkpoint.config.text
    if role is Role.ATTENTION:
        every = Tokens(tokens, tokens, plan.needs.streams)
        return solving_attention(text, every, calibration_length(plan), scheme, device)
    own = tokens_of(text, role, tokens)
    lent = min(plan.recipe.calibration.min_tokens, tokens) if role is Role.ROUTED_EXPERT else 0
    counted = Tokens(max(own, lent), own, plan.needs.streams)
    together = max(1, plan.needs.together) if role is Role.ROUTED_EXPERT else 1
    return solving_mlp(text, mlps_of(text)[role].inner, counted, scheme, device, together)


def running(text: TextConfig, tokens: float, length: int, kind: Kind, device: str) -> Work:
    """Tokens once through all layers."""
    work = Work()
    work.include(attending(text, tokens, length, kind, device), text.num_hidden_layers)
    for role, units in mlps_of(text).items():
        through = tokens_of(text, role, tokens)
        work.include(running_mlp(text, units.inner, through, kind, _PHASES[role], device), units.count)
    return work


_PHASES = {Role.DENSE_MLP: "dense MLPs", Role.SHARED_EXPERT: "shared experts", Role.ROUTED_EXPERT: "experts"}


def calibration_length(plan: Plan) -> int:
    """Tokens of a sequence that is calibrated on."""
    assert plan.recipe.calibration is not None
    text = plan.checkpoint.config.text
    return plan.recipe.calibration.sequence_length or min(DEFAULT_LENGTH, text.max_position_embeddings)


def _solved(plan: Plan) -> Counter[tuple[Role, str]]:
    """How many units of a role and a scheme are solved."""
    units = {
        (target.linear.layer, target.linear.role, target.linear.expert, target.scheme) for target in plan.calibrated
    }
    return Counter((role, scheme) for _, role, _, scheme in units)


def _loading(plan: Plan) -> Work:
    """Reading every layer's matrices once, and those that are quantized back."""
    work = Work()
    work.include(layer_weights(plan.checkpoint).loading())
    work.add("reading back", Kind.UNPACK, _quantized(plan))
    return work


def _written(targets: Iterable[Target], units: int) -> Work:
    work, nbytes = Work(), sum(tensor.nbytes for target in targets for tensor in target.tensors)
    work.add("writing", Kind.WRITE, nbytes)
    work.add("writing", Kind.HASH, 2 * nbytes)  # of a unit for the journal, of a tensor for the manifest
    work.add("writing", Kind.SYNC, SYNCS_A_UNIT * units)
    return work


@dataclass(frozen=True)
class LayerWeights:
    """The matrices of all layers of a checkpoint: how many weights, plain and quantized, and their bytes in files, of
    which some are those of routed experts."""

    plain: int
    quantized: int
    nbytes: int
    routed: int

    def loading(self, times: float = 1) -> Work:
        """Reading them all, `times` over."""
        work = Work()
        work.add("loading", Kind.READ, times * self.nbytes)
        work.add("loading", Kind.WIDEN, times * self.plain)
        work.add("loading", Kind.UNPACK, times * self.quantized)
        return work


def layer_weights(checkpoint: Checkpoint) -> LayerWeights:
    """Those of a checkpoint, or of the artifact it is."""
    numel = sum(linear.numel for linear in catalogue(checkpoint.config).linears)
    held = {name: entry for name, entry in checkpoint.entries.items() if classify(name).role in QUANTIZABLE}
    nbytes = sum(entry.nbytes for entry in held.values())
    routed = sum(entry.nbytes for name, entry in held.items() if classify(name).role is Role.ROUTED_EXPERT)
    if not checkpoint.config.quantized:
        units = mlps_of(checkpoint.config.text).get(Role.ROUTED_EXPERT, Units(0, 0))
        counted = 2 * units.count * mlp_numbers(checkpoint.config.text, units.inner)
        return LayerWeights(numel, 0, nbytes or 2 * numel, routed if nbytes else counted)
    plain = sum(
        math.prod(held[name].shape) for name in held if name.endswith(f".{WEIGHT}") and held[name].dtype in FLOATS
    )
    return LayerWeights(plain, numel - plain, nbytes, routed)


def evaluating(
    text: TextConfig, models: Sequence[LayerWeights], tokens: int, length: int, device: str = CPU, *, digested: int = 0
) -> list[Work]:
    """Models beside each other on so many tokens, the original first: layers, units compared on a sample, answers;
    `digested` bytes of artifacts are read for their digests before."""
    walked = Work()
    for model in models:
        walked.include(model.loading())
    walked.include(running(text, tokens, length, Kind.FORWARD, device), len(models))
    sampled = min(tokens / SAMPLED_SHARE, SAMPLE_ROWS)
    walked.include(running(text, sampled, length, Kind.FORWARD, device), len(models) - 1)
    walked.include(scoring(text, tokens, len(models)))
    digest = Work()
    digest.add("digesting", Kind.READ, digested)
    digest.add("digesting", Kind.HASH, digested)
    return [starting(models=True), digest, walked]


@dataclass(frozen=True)
class Asked:
    """Requests for log-likelihoods: tokens that walk, tokens that are scored, the longest request, walks over the weights."""

    tokens: int
    scored: int
    longest: int
    passes: int


def asking(text: TextConfig, models: Sequence[LayerWeights], asked: Asked, device: str = CPU) -> Work:
    """Models asked for log-likelihoods one after the other, as `evaluate.streamed_scorer` does."""
    work = Work()
    for model in models:
        work.include(model.loading(asked.passes))
    walked = Work()
    walked.include(running(text, asked.tokens, asked.longest, Kind.FORWARD, device))
    walked.include(scoring(text, asked.scored, 1))
    work.include(walked, len(models))
    return _in_one_phase(work, "tasks")


@dataclass(frozen=True)
class Talk:
    """So many prompts at once, each of about so many tokens, and the most tokens of their answers."""

    prompts: int
    prompt_tokens: int
    tokens: int

    def shares(self, text: TextConfig) -> tuple[float, float]:
        """How often all that is no routed expert is read, and all of those: whole for the first token, then at most as
        many experts of a layer as there are prompts."""
        routed = min(1.0, self.prompts * text.num_experts_per_tok / max(1, text.num_local_experts))
        return float(self.tokens), 1 + (self.tokens - 1) * routed

    def record(self, text: TextConfig, models: Sequence[LayerWeights]) -> dict[str, int] | None:
        """As JSON; None without tokens."""
        if not self.tokens:
            return None
        return {"tokens": self.tokens, "prompts": self.prompts, "read_bytes": self.read_bytes(text, models)}

    def read_bytes(self, text: TextConfig, models: Sequence[LayerWeights]) -> int:
        """Bytes that are read at most, the head of each model included."""
        if not self.tokens:
            return 0
        heads = len(models) * self.tokens * STORED * text.vocab_size * text.hidden_size
        whole, routed = self.shares(text)
        return round(sum(whole * (one.nbytes - one.routed) + routed * one.routed for one in models)) + heads

    def walked_bytes(self, models: Sequence[LayerWeights]) -> int:
        """Bytes of layers that a walk says it has done: experts that no token goes to are done too."""
        return self.tokens * sum(one.nbytes for one in models)


NO_TALK = Talk(0, 0, 0)


def talking(text: TextConfig, models: Sequence[LayerWeights], talk: Talk, device: str = CPU) -> Work:
    """Models that say something, one after the other, as `evaluate.generate` has them."""
    work = Work()
    if not talk.tokens:
        return work
    for model in models:
        work.include(model.loading(talk.read_bytes(text, [model]) / max(1, model.nbytes)))
    walked = Work()
    walked.include(running(text, talk.prompts * talk.prompt_tokens, talk.prompt_tokens, Kind.FORWARD, device))
    walked.include(running(text, talk.prompts, talk.prompt_tokens, Kind.FORWARD, device), talk.tokens - 1)
    walked.include(scoring(text, talk.prompts, 1), talk.tokens)
    walked.add("saying", Kind.SYNC, SYNCS_A_LAYER * text.num_hidden_layers * talk.tokens)
    work.include(walked, len(models))
    return _in_one_phase(work, "sample")


def _in_one_phase(work: Work, phase: str) -> Work:
    one = Work()
    for _, kind, amount in work.items():
        one.add(phase, kind, amount)
    return one


def verifying(artifact_bytes: int, source_bytes: int, weights: int) -> list[Work]:
    """Reading an artifact and its source, and holding one against the other."""
    work = Work()
    work.add("verifying", Kind.READ, artifact_bytes + source_bytes)
    work.add("verifying", Kind.HASH, artifact_bytes)
    work.add("verifying", Kind.UNPACK, 2 * weights)
    return [starting(models=False), work]


def measuring(
    text: TextConfig,
    weights: LayerWeights,
    walked: Sequence[tuple[int, float]],
    changed: Mapping[tuple[Role, RecipeScheme], float],
    tokens: tuple[int, int],
    waves: int,
    length: int,
    device: str = CPU,
) -> list[Work]:
    """Streams that are `walked` through some layers with some tokens each, in `waves` over the weights; units of a role
    are given a scheme, `changed` of them; of `tokens`, some are measured and some calibrated on."""
    work = Work()
    work.include(weights.loading(waves))
    layer = text.num_hidden_layers
    for layers, rows in walked:
        work.include(running(text, rows, length, Kind.TENSOR, device), layers / layer)
    for (role, scheme), count in changed.items():
        work.include(_changing(text, role, scheme, tokens, length, device), count)
    work.include(scoring(text, tokens[0], len(walked)))
    return [starting(models=True), work]


def _changing(
    text: TextConfig, role: Role, scheme: RecipeScheme, tokens: tuple[int, int], length: int, device: str
) -> Work:
    """One unit given a scheme, and run on what it measured on as it was and as it is."""
    work, units = Work(), mlps_of(text).get(role)
    if units is None and scheme.gptq is not None:
        return solving_attention(text, Tokens(tokens[1], tokens[1], 2), length, scheme, device)
    if units is None:
        numel = sum(math.prod(shape) for shape in attention_shapes(text).values())
        work.include(rounding(scheme, numel))
        return work
    if scheme.gptq is not None:
        own = tokens_of(text, role, tokens[1])
        work.include(solving_mlp(text, units.inner, Tokens(own, own, 2), scheme, device))
    else:
        work.include(rounding(scheme, 3 * text.hidden_size * units.inner))
    through = tokens_of(text, role, tokens[0])
    work.include(running_mlp(text, units.inner, through, Kind.TENSOR, "changed units", device), 2)
    return work


def building(plan: Plan, device: str, evaluated: tuple[int, int] | None, talk: Talk = NO_TALK) -> dict[str, list[Work]]:
    """The steps of `build` that take long; `evaluated` are tokens and the length of a sequence, if accuracy is measured.

    Original and artifact walk beside each other; then both `talk`.
    """
    quantized = _quantized(plan)
    steps = {
        "quantize": quantizing(plan, device),
        "verify": verifying(plan.artifact_bytes, plan.source_weight_bytes, quantized),
    }
    if evaluated is not None:
        (tokens, length), text, models = evaluated, plan.checkpoint.config.text, both_weights(plan)
        steps["evaluate"] = evaluating(text, models, tokens, length, device)
        steps["evaluate"].append(talking(text, models, talk, device))
    return steps


def both_weights(plan: Plan) -> tuple[LayerWeights, LayerWeights]:
    """Those of the original and of the artifact that is planned."""
    original, quantized = layer_weights(plan.checkpoint), _quantized(plan)
    sizes = Counter({role: 0 for role in QUANTIZABLE})
    for tensor in plan.tensors:
        sizes[tensor.role] += tensor.nbytes
    held = sum(sizes[role] for role in QUANTIZABLE)
    return original, LayerWeights(original.plain - quantized, quantized, held, sizes[Role.ROUTED_EXPERT])


def _quantized(plan: Plan) -> int:
    """Weights that a plan quantizes."""
    return sum(linear.numel for linear, scheme in plan.assigned if scheme is not None)


def tokens_at_most(text: TextConfig, samples: int, length: int | None) -> tuple[int, int]:
    """How many tokens so many sequences have at most, and the length of one."""
    longest = length or min(DEFAULT_LENGTH, text.max_position_embeddings)
    return samples * longest, longest
