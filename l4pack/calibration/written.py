"""What calibration writes, by the names under which the journal keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from l4pack.checkpoint.reader import NUMPY_TYPES
from l4pack.checkpoint.writer import Extent, ShardWriter
from l4pack.formats.known import load_format
from l4pack.formats.weights import weights_of
from l4pack.plan.extents import made_by_rows, target_extents
from l4pack.quant.floats import Float32Array
from l4pack.recipe import RecipeScheme
from l4pack.stream.units import Unit, layer_units, module_names

if TYPE_CHECKING:
    from l4pack.plan.assign import PlannedTensor, Target
    from l4pack.plan.plan import Plan


def unit_key(unit: Unit) -> str:
    """A unit whose matrices are solved."""
    return str(unit)


def input_scales_key(layer: int) -> str:
    """The scales of a layer's inputs."""
    return f"input scales of layer {layer}"


def cache_key(layer: int) -> str:
    """The scales of a layer's keys and values."""
    return f"KV cache of layer {layer}"


def written_weights(writer: ShardWriter, target: Target, scheme: RecipeScheme) -> Float32Array:
    """A matrix [out, in] as the artifact holds it by now, read back from what was written of it."""
    arrays = {
        target.suffix(tensor): writer.read(tensor.name).view(NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor, _ in made_by_rows(target, scheme)
    }
    size = target.linear.out_features, target.linear.in_features
    return weights_of(arrays, load_format(scheme.format), scheme, *size, target.module)


def calibrated_extents(plan: Plan) -> dict[str, list[Extent]]:
    """The bytes behind each key, in the order they are written."""
    return {key: extents for _, key, extents in _written(plan) if extents}


def layers_of(plan: Plan) -> dict[str, int]:
    """The layer of each key."""
    return {key: layer for layer, key, extents in _written(plan) if extents}


def _written(plan: Plan) -> Iterator[tuple[int, str, list[Extent]]]:
    config = plan.checkpoint.config
    targets = {target.module: target for target in plan.calibrated}
    observed = {target.module: target for target in plan.observed}
    for layer in range(config.text.num_hidden_layers):
        units = layer_units(config, layer)
        for unit in units:
            solved = [targets[name] for name in module_names(config, unit).values() if name in targets]
            yield layer, unit_key(unit), [one for target in solved for one in target_extents(target, plan.recipe)]
        modules = sorted(name for unit in units for name in module_names(config, unit).values())
        scales = [observed[name].input_scale for name in modules if name in observed]
        yield layer, input_scales_key(layer), _whole(scales)
        yield layer, cache_key(layer), _whole([tensor for tensor in plan.kv_scales if tensor.layer == layer])


def _whole(tensors: list[PlannedTensor]) -> list[Extent]:
    return [Extent(tensor.name, 0, tensor.nbytes) for tensor in tensors]
