"""Artifacts in a client not written here: transformers loads every tensor, and answers as fake-quantized weights do.

The expected weights are what compressed-tensors' own decompressor makes of the artifact's tensors under the scheme that
its own schema reads from the artifact's config.json; the expected logits are those of the source's fused model with
these weights put in.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from compressed_tensors.utils import match_named_modules
from transformers import AutoConfig
from transformers.utils.quantization_config import CompressedTensorsConfig
from upstream import decompressed, load, logits, model_class, reference, schema, weights

from l4pack.artifact.patterns import matches
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe, recipe_names

# transformers says that it takes `dequantize` from the argument and the rest from the artifact, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent:UserWarning")

KINDS = ["scout", "maverick", "text"]
GENERIC = [name for name in recipe_names() if load_recipe(name).promise is None and not name.startswith("gguf-")]
UNIFORM = [name for name in GENERIC if len(load_recipe(name).schemes) == 1]  # dequantizing at load takes no others
SOLVED = ("nvfp4", "nvfp4-w4a4", "mxfp4", "fp8-gptq", "fp8-best")  # which takes a while: for one kind of model
SOURCE = {"dtype": "float32", "seed": 3}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "recipe"), [(kind, name) for kind in KINDS for name in UNIFORM if name not in SOLVED or kind == "maverick"]
)
def test_logits_equal_those_of_the_fake_quantized_model(checkpoint, artifact, recipe, kind):
    made = artifact(recipe, kind, **SOURCE)
    dense = decompressed(made)
    assert dense
    expected = logits(reference(checkpoint(kind, **SOURCE), kind, dense))
    model = load(made, kind, quantization_config=CompressedTensorsConfig(dequantize=True))
    loaded = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(torch.equal(loaded[name], weight) for name, weight in dense.items())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    original = logits(load(checkpoint(kind, **SOURCE), kind))
    assert (expected - original).abs().max() > 1e-3  # quantizing is felt: the test can fail


@pytest.mark.parametrize("recipe", ["int4-rtn", "int4", "int4-uniform", "meta-int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_give_the_same_logits(checkpoint, artifact, recipe, kind):
    made = artifact(recipe, kind, **SOURCE)
    expected = logits(reference(checkpoint(kind, **SOURCE), kind, decompressed(made)))
    torch.testing.assert_close(logits(load(made, kind)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["fp8", "fp8-block", "meta-fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_fp8_weights_load_too(artifact, recipe, kind):
    """Here transformers also quantizes activations, so logits are near the weight-only ones and not equal."""
    model = load(artifact(recipe, kind, **SOURCE), kind)
    assert torch.isfinite(logits(model)).all()


def test_bfloat16_artifacts_load_whole(artifact):
    for kind in KINDS:
        load(artifact("int4-rtn", kind), kind)
        load(artifact("fp8", kind), kind, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_rounded_fp4_inputs_load_whole(artifact):
    """Here transformers takes the global scales of inputs; its decompressed weights are bfloat16 whatever the model is."""
    load(artifact("nvfp4-w4a4", "maverick", **SOURCE), "maverick")


def _recipe(name, change):
    values = load_recipe(name).model_dump()
    change(values)
    return Recipe.model_validate(values)


VARIANTS = {
    "asymmetric": _recipe("int4-rtn", lambda v: v["schemes"]["int4"].update(symmetric=False)),
    "channel": _recipe("int4-rtn", lambda v: v["schemes"]["int4"].update(strategy="channel", group_size=None)),
    "int8": _recipe("int4-rtn", lambda v: v["schemes"]["int4"].update(num_bits=8, group_size=32)),
    "attention": _recipe("int4-rtn", lambda v: v["rules"][0]["roles"].append("attention")),
    "tensor": _recipe("fp8", lambda v: v["schemes"]["fp8"].update(strategy="tensor")),
    "some layers": _recipe("fp8", lambda v: v["rules"].insert(0, {"roles": ["shared_expert"], "layers": [1], "scheme": "keep"})),
}  # fmt: skip


@pytest.mark.parametrize("recipe", VARIANTS.values(), ids=VARIANTS)
def test_other_schemes_are_read_as_meant(checkpoint, tmp_path, recipe):
    source = checkpoint("scout", **SOURCE)
    made = run_plan(make_plan(open_source(str(source)), recipe.keeping(float32=True)), tmp_path / "made").out
    expected = logits(reference(source, "scout", decompressed(made)))
    model = load(made, "scout", quantization_config=CompressedTensorsConfig(dequantize=True))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@cache
def skeleton(kind, config_file):
    """transformers' modules with one Linear for each projection of each expert, as it makes them for such artifacts."""
    from transformers.quantizers.base import SequentialLlama4TextExperts

    config = AutoConfig.from_pretrained(config_file.parent)
    with torch.device("meta"):
        model = model_class(kind)(config)
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("feed_forward.experts"):
                model.set_submodule(name, SequentialLlama4TextExperts(config.get_text_config()))
    return model


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [(kind, name) for kind in KINDS for name in (*GENERIC, *VARIANTS) if name not in SOLVED or kind == "maverick"],
)
def test_the_stanza_names_just_what_is_quantized(checkpoint, artifact, tmp_path, recipe, kind):
    if recipe in VARIANTS:
        made = run_plan(
            make_plan(open_source(str(checkpoint(kind, **SOURCE))), VARIANTS[recipe]), tmp_path / "made"
        ).out
    else:
        made = artifact(recipe, kind, **SOURCE)
    quantized = {name.removesuffix(".weight_scale") for name in weights(made) if name.endswith(".weight_scale")}
    config = schema(made)
    model = skeleton(kind, checkpoint(kind, **SOURCE) / "config.json")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized < linears
    ignored = {name for name in linears if any(matches(pattern, name) for pattern in config.ignore)}
    assert ignored == linears - quantized
    targets = [target for group in config.config_groups.values() for target in group.targets]
    assert {name for name, _ in match_named_modules(model, targets, config.ignore)} == quantized


def test_two_schemes_in_one_artifact(checkpoint, tmp_path):
    """Here compressed-tensors' own matching is the judge; test_mixed.py has transformers load such artifacts."""
    values = load_recipe("int4-rtn").model_dump()
    values["schemes"]["fp8"] = load_recipe("fp8").model_dump()["schemes"]["fp8"]
    values["rules"][0]["roles"] = ["routed_expert", "dense_mlp"]
    values["rules"].insert(1, {"roles": ["shared_expert"], "scheme": "fp8"})
    source = checkpoint("maverick", **SOURCE)
    plan = make_plan(open_source(str(source)), Recipe.model_validate(values))
    config = schema(run_plan(plan, tmp_path / "made").out)
    assert config.format == "mixed-precision"
    model = skeleton("maverick", source / "config.json")
    given = {linear.module: scheme for linear, scheme in plan.assigned if scheme}
    found = {}
    for group in config.config_groups.values():
        for name, _ in match_named_modules(model, group.targets, config.ignore):
            assert name not in found
            found[name] = "int4" if group.weights.num_bits == 4 else "fp8"
    assert found == given
