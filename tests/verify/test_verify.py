"""Good artifacts verify clean, ours and compressed-tensors' own; every kind of damage is found by its rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import broken_artifacts as broken
import damage
import pytest
import torch
import vllm_artifacts as foreign

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.checkpoint.source import open_folder
from l4pack.errors import SourceError
from l4pack.plan.plan import RunLimits, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe, recipe_names
from l4pack.verify.verify import Verification, verify_artifact

ASYMMETRIC = """
name: asymmetric
title: Asymmetric int4 for a test
schemes:
  int4: {format: pack-quantized, num_bits: 4, strategy: group, group_size: 32, symmetric: false}
rules:
  - {roles: [routed_expert, shared_expert, dense_mlp], scheme: int4}
  - {roles: all, scheme: keep}
"""
ODD = """
name: odd
title: Int4 with one scale a channel, in widths that leave the last word half empty
schemes:
  int4: {format: pack-quantized, num_bits: 4, strategy: channel, scale_dtype: float32}
  tensor: {format: float-quantized, num_bits: 8, type: float, strategy: tensor, activations: dynamic_token}
rules:
  - {roles: [routed_expert], scheme: int4}
  - {roles: [attention], scheme: tensor}
  - {roles: all, scheme: keep}
"""
OWN_RECIPES = {"asymmetric": ASYMMETRIC, "odd": ODD}

Make = Callable[..., Path]


def complete(folder: Path) -> Path:
    """Add the files a published Llama 4 has beside its weights."""
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Llama4ImageProcessorFast"}')
    (folder / "processor_config.json").write_text('{"processor_class": "Llama4Processor"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("LLAMA 4 COMMUNITY LICENSE AGREEMENT")
    for name, text in (("tokenizer.json", '{"model": {}}'), ("tokenizer_config.json", "{}")):
        if not (folder / name).exists():
            (folder / name).write_text(text)
    if not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def source(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny checkpoint with all its files, each kind made once."""
    made: dict[str, Path] = {}

    def make(kind: str = "scout", **options: object) -> Path:
        key = json.dumps([kind, options])
        if key not in made:
            folder = tmp_path_factory.mktemp("verify") / f"source-{kind}"
            made[key] = complete(Path(shutil.copytree(checkpoint(kind, **options), folder)))
        return made[key]

    return make


@pytest.fixture(scope="session")
def artifact(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An artifact of a tiny checkpoint, each made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(kind: str = "scout", recipe: str = "int4-rtn", shard_bytes: int = 10**9, **options: object) -> Path:
        key = (kind, recipe, shard_bytes, json.dumps(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("verify")
            name = recipe
            if recipe in OWN_RECIPES:
                (folder / f"{recipe}.yaml").write_text(OWN_RECIPES[recipe])
                name = str(folder / f"{recipe}.yaml")
            plan = make_plan(
                open_folder(source(kind, **options)), load_recipe(name), RunLimits(shard_bytes=shard_bytes)
            )
            run_plan(plan, folder / "artifact")
            made[key] = folder / "artifact"
        return made[key]

    return make


@pytest.fixture
def copy(artifact: Make, tmp_path: Path) -> Make:
    """A copy of an artifact to break."""

    def make(*arguments: object, **options: object) -> Path:
        return Path(shutil.copytree(artifact(*arguments, **options), tmp_path / "artifact"))

    return make


def rules(result: Verification, level: str = "error") -> set[str]:
    return {finding.rule for finding in result.findings if finding.level == level}


def rounded_recipes() -> list[str]:
    """Recipes that need no calibration text."""
    recipes = [load_recipe(name) for name in recipe_names()]
    return [recipe.name for recipe in recipes if recipe.calibration is None]


@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
@pytest.mark.parametrize("recipe", [*rounded_recipes(), *OWN_RECIPES])
def test_our_artifacts_verify_clean(kind: str, recipe: str, source: Make, artifact: Make) -> None:
    folder = artifact(kind, recipe)
    assert verify_artifact(folder).ok
    result = verify_artifact(folder, open_folder(source(kind)))
    assert result.ok
    assert {finding.rule for finding in result.findings} <= {"runtime"}
    plan = make_plan(open_folder(source(kind)), load_recipe(recipe)) if recipe not in OWN_RECIPES else None
    tally = result.checked.tally
    assert tally.matrices == tally.matrices_compared == tally.within_half_step > 0
    assert tally.tensors == tally.digests
    if plan is not None:
        assert tally.tensors == len(plan.tensors)
        assert tally.bytes == plan.weight_bytes
        assert tally.matrices == sum(name is not None for _, name in plan.assigned)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("unfused", "bfloat16"), ("fused", "float16"), ("fused", "float32"), ("unfused", "float32")]
)
def test_sources_of_other_layouts_and_dtypes(layout: str, dtype: str, source: Make, artifact: Make) -> None:
    options = {"layout": layout, "dtype": dtype}
    for recipe in ("int4-rtn", "meta-fp8"):
        folder = artifact("scout", recipe, **options)
        result = verify_artifact(folder, open_folder(source("scout", **options)))
        assert result.ok, result.findings


MLP = "feed_forward"
FOREIGN = {
    "int4 symmetric": ({MLP: foreign.int_scheme()}, set()),
    "int4 asymmetric": ({MLP: foreign.int_scheme(symmetric=False)}, {"runtime"}),
    "int4 by channel": ({MLP: foreign.int_scheme(strategy="channel", group_size=None)}, set()),
    "int8": ({MLP: foreign.int_scheme(num_bits=8)}, set()),
    "fp8 by channel": ({MLP: foreign.fp8_scheme()}, set()),
    "fp8 by block": ({MLP: foreign.fp8_scheme("block", foreign.GROUP_FP8)}, set()),
    "fp8 static": ({MLP: foreign.fp8_scheme("tensor", foreign.TENSOR_FP8)}, set()),
    "everything": ({"": foreign.int_scheme()}, {"runtime"}),
    "attention in another scheme": ({"self_attn": foreign.fp8_scheme(), MLP: foreign.int_scheme()}, {"runtime"}),
}


@pytest.mark.parametrize(("name", "multimodal"), [*((name, True) for name in FOREIGN), ("int4 symmetric", False)])
def test_artifacts_of_compressed_tensors_own_compressors_verify_clean(
    name: str, multimodal: bool, tmp_path: Path
) -> None:
    schemes, warnings = FOREIGN[name]
    origin = complete(
        foreign.write_source(tmp_path / "source", foreign.model_config(interleave=2, multimodal=multimodal))
    )
    folder = foreign.write_artifact(origin, tmp_path / "artifact", schemes)
    for file in origin.glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    checkpoint = open_folder(origin)
    for against in (None, checkpoint):
        result = verify_artifact(folder, against)
        assert result.ok, result.findings
        assert rules(result, "warning") == warnings
    assert result.checked.tally.matrices_compared == result.checked.tally.matrices > 0


@pytest.mark.parametrize("name", broken.BROKEN)
def test_damage_is_found_by_its_rule(name: str, source: Make, copy: Make) -> None:
    item = broken.BROKEN[name]
    folder = copy("scout", item.recipe)
    item.damage(folder)
    if item.source:
        damage.resigned(folder)
    else:
        damage.unsigned(folder)
    result = verify_artifact(folder, open_folder(source()) if item.source else None)
    assert not result.ok
    assert rules(result) == item.rules, result.findings
    assert any(item.places in finding.where for finding in result.findings if finding.level == "error")


@pytest.mark.parametrize("name", broken.BROKEN_SHARDS)
def test_damage_of_shards_and_index(name: str, copy: Make) -> None:
    item = broken.BROKEN_SHARDS[name]
    folder = copy("scout", "int4-rtn", shard_bytes=500_000)
    assert verify_artifact(folder).ok
    item.damage(damage.unsigned(folder))
    result = verify_artifact(folder)
    assert not result.ok
    assert rules(result) == item.rules, result.findings
    assert any(item.places in finding.where for finding in result.findings)


def test_any_changed_byte_differs_from_the_manifest(copy: Make) -> None:
    folder = copy("scout", "fp8")
    names = [f"{damage.GATE}.weight", "language_model.lm_head.weight", f"{damage.GATE}.weight_scale"]
    damage.edit(folder, lambda tensors: [flip(tensors[name]) for name in names] and tensors)
    result = verify_artifact(folder)
    wrong = sorted(finding.where for finding in result.findings if finding.rule == "digest")
    assert wrong == sorted([*names, "model.safetensors"])  # its header has another order now
    assert rules(result) == {"digest"}


def flip(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[0] ^= 1


def test_manifest_that_lists_other_tensors_or_is_no_json(copy: Make) -> None:
    folder = copy()
    damage.edit_json(folder, lambda manifest: manifest["tensors"].popitem(), MANIFEST_NAME)
    assert rules(verify_artifact(folder)) == {"digest"}
    (folder / MANIFEST_NAME).write_text("{")
    assert rules(verify_artifact(folder)) == {"manifest"}


def test_words_filled_up_with_other_than_zeros(source: Make, artifact: Make, copy: Make) -> None:
    options = {"intermediate_size": 132}
    result = verify_artifact(artifact("scout", "odd", **options), open_folder(source("scout", **options)))
    assert rules(result) == {"runtime"}  # no runtime has kernels for half a word
    folder = damage.unsigned(copy("scout", "odd", **options))
    name = f"{damage.DOWN}.weight_packed"

    def fill(words: torch.Tensor) -> torch.Tensor:
        words[7, -1] |= 1 << 20
        return words

    damage.put(name, fill)(folder)
    result = verify_artifact(folder)
    assert rules(result) == {"runtime", "packing"}
    assert [finding.where for finding in result.findings if finding.rule == "packing"] == [name]


def test_dead_weights_are_no_damage_when_nothing_else_is_asked(copy: Make) -> None:
    """Biases may be all zeros."""
    folder = damage.unsigned(copy())
    name = "vision_model.layernorm_pre.bias"
    damage.put(name, torch.zeros_like)(folder)
    assert verify_artifact(folder).ok


def test_a_sample_compares_as_many_matrices_as_it_says(source: Make, artifact: Make) -> None:
    against = open_folder(source())
    first, again = (verify_artifact(artifact(), against, sample=7) for _ in range(2))
    assert first == again
    assert first.ok
    assert first.checked.tally.matrices_compared == 7
    assert first.checked.sampled_of == first.checked.tally.matrices > 7
    assert verify_artifact(artifact(), against, sample=10**6).checked.sampled_of is None


def test_a_model_of_another_shape_is_not_compared(source: Make, artifact: Make) -> None:
    result = verify_artifact(artifact("scout"), open_folder(source("maverick")))
    assert not result.ok
    (cause,) = [finding for finding in result.findings if finding.level == "error"]
    assert cause.rule == "source"
    assert cause.message.startswith("made from source-scout, compared with ")
    assert "it is a model of another shape (experts 4 and 8): nothing was compared" in cause.message
    assert result.checked.tally.matrices_compared == 0


def test_another_seed_of_the_same_model_is_another_model(source: Make, artifact: Make) -> None:
    """One error, first, and not one for every matrix."""
    result = verify_artifact(artifact(), open_folder(source("scout", seed=1)))
    (cause,) = [finding for finding in result.findings if finding.level == "error"]
    assert cause == result.findings[0]
    assert cause.rule == "source"
    count = result.checked.tally.matrices
    assert f"another model or a fine-tune: {count} of {count} quantized matrices and" in cause.message


def test_the_same_model_in_another_layout_is_the_same_model(source: Make, artifact: Make) -> None:
    result = verify_artifact(artifact(), open_folder(source("scout", layout="unfused")))
    assert result.ok
    assert [finding.rule for finding in result.findings if finding.rule != "runtime"] == ["source"]


def test_an_unquantized_checkpoint_is_not_an_artifact(source: Make) -> None:
    result = verify_artifact(source())
    assert not result.ok
    assert {"stanza", "fused"} <= rules(result)


def test_progress_counts_every_tensor_byte(source: Make, artifact: Make) -> None:
    seen: list[int] = []
    result = verify_artifact(artifact(), open_folder(source()), advance=seen.append)
    assert sum(seen) == result.checked.tally.bytes


@pytest.mark.parametrize("harm", ["gone", "no config", "no weights", "other model"])
def test_what_can_not_be_opened(harm: str, copy: Make) -> None:
    folder = copy()
    if harm == "gone":
        shutil.rmtree(folder)
    elif harm == "no config":
        (folder / "config.json").unlink()
    elif harm == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError):
        verify_artifact(folder)


def test_attention_that_vllm_can_not_permute_is_a_warning(tmp_path: Path) -> None:
    schemes = {
        "self_attn": foreign.fp8_scheme("block", foreign.GROUP_FP8),
        "feed_forward": foreign.int_scheme(symmetric=False),
    }
    origin = complete(foreign.write_source(tmp_path / "source", foreign.model_config(head_dim=128)))
    folder = foreign.write_artifact(origin, tmp_path / "artifact", schemes)
    messages = [finding.message for finding in verify_artifact(folder).findings if finding.rule == "runtime"]
    assert any(message.startswith("vllm") and "block scales of q_proj and k_proj" in message for message in messages)


MANIFESTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "config.json": (damage.config("text_config", "attn_scale", value=0.2), "digest", "config.json"),
    "tokenizer": (damage.text_of("tokenizer.json", lambda text: text + " "), "digest", "tokenizer.json"),
    "a template gone": (damage.remove("chat_template.jinja"), "digest", "chat_template.jinja"),
    "a template more": (damage.add("additional_chat_templates/x.jinja"), "strange", "additional_chat_templates/x.jinja"),
    "notes": (damage.add("notes.txt"), "strange", "notes.txt"),
    "named like a record": (damage.add("l4pack-secrets.json"), "strange", "l4pack-secrets.json"),
    "named like an evaluation": (damage.add("accuracy-notes.json"), "strange", "accuracy-notes.json"),
    "no recipe": (lambda folder: damage.edit_json(folder, lambda m: m.pop("recipe"), MANIFEST_NAME), "manifest", MANIFEST_NAME),
    "a recipe of nothing": (
        lambda folder: damage.edit_json(folder, lambda m: m.update(recipe={}), MANIFEST_NAME), "manifest", MANIFEST_NAME
    ),
    "an older version": (
        lambda folder: damage.edit_json(folder, lambda m: m.update(schema_version=1), MANIFEST_NAME), "manifest", MANIFEST_NAME
    ),
    "a version to come": (
        lambda folder: damage.edit_json(folder, lambda m: m.update(schema_version=99), MANIFEST_NAME), "manifest", MANIFEST_NAME
    ),
    "another recipe": (
        lambda folder: damage.edit_json(
            folder, lambda m: m["recipe"]["schemes"]["int4"].update(group_size=64), MANIFEST_NAME
        ),
        "manifest", "quantization_config.config_groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_the_manifest_covers(name: str, copy: Make) -> None:
    change, rule, where = MANIFESTS[name]
    folder = copy()
    change(folder)
    found = [finding for finding in verify_artifact(folder).findings if finding.level == "error"]
    assert (rule, where) in {(finding.rule, finding.where) for finding in found}


def test_what_package_and_evaluate_add_is_not_strange(copy: Make) -> None:
    folder = copy()
    for name in ("README.md", "NOTICE", "USE_POLICY.md", "accuracy.json"):
        (folder / name).write_text("x")
    assert verify_artifact(folder).ok


def test_the_header_of_a_shard_is_covered(copy: Make) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy()
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    save_file(state, path, {"format": "pt", "note": "moved"})
    assert rules(verify_artifact(folder)) == {"digest"}


@pytest.fixture(scope="module")
def solved(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated artifact."""
    from conftest import quick_plan

    plan = quick_plan(source("scout", hidden_size=256, intermediate_size=256), "int4-uniform")
    return run_plan(plan, tmp_path_factory.mktemp("solved") / "artifact").out


@pytest.fixture(scope="module")
def watched(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose inputs have fixed scales."""
    from conftest import quick_plan

    return run_plan(quick_plan(source(), "fp8-static"), tmp_path_factory.mktemp("watched") / "artifact").out


SOLVED = {
    "one scale doubled": damage.put(f"{damage.GATE}.weight_scale", damage.times(2.0)),
    "one scale halved": damage.put(f"{damage.DOWN}.weight_scale", damage.times(0.5, column=1)),
    "scale rows exchanged": damage.put(f"{damage.GATE}.weight_scale", lambda scale: scale.flip(0)),
    "scale rows rolled": damage.put(f"{damage.DOWN}.weight_scale", lambda scale: scale.roll(1, 0)),
    "scale columns exchanged": damage.put(f"{damage.GATE}.weight_scale", lambda scale: scale.flip(1)),
    "signs of a group": damage.put(f"{damage.GATE}.weight_packed", damage.turned),
    "experts exchanged": damage.swap(damage.GATE, f"{damage.EXPERTS}3.gate_proj"),
    "rows rolled": damage.put(f"{damage.GATE}.weight_packed", lambda words: words.roll(1, 0)),
}


@pytest.mark.parametrize("known", ["manifest", "record"])
@pytest.mark.parametrize("factor", [0.5, 1.02, 3.0])
@pytest.mark.parametrize("module", [damage.DOWN, f"{damage.LAYER}feed_forward.shared_expert.up_proj"])
def test_input_scales_are_those_that_calibration_recorded(
    module: str, factor: float, known: str, watched: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(watched, tmp_path / "artifact"))
    (damage.resigned if known == "manifest" else damage.unsigned)(folder)
    assert verify_artifact(folder).ok
    damage.put(f"{module}.input_scale", lambda scale: scale * factor)(folder)
    (damage.resigned if known == "manifest" else damage.unsigned)(folder)
    (wrong,) = [finding for finding in verify_artifact(folder).findings if finding.level == "error"]
    assert (wrong.rule, wrong.where) == ("scale", f"{module}.input_scale")
    assert "l4pack-calibration.json makes it" in wrong.message


def test_a_solved_artifact_verifies_clean(source: Make, solved: Path) -> None:
    result = verify_artifact(solved, open_folder(source("scout", hidden_size=256, intermediate_size=256)))
    assert result.ok
    assert not result.checked.tally.recomputed


@pytest.mark.parametrize("suffix", ["weight_packed", "weight"])
@pytest.mark.parametrize("module", [damage.DOWN, f"{damage.LAYER}feed_forward.shared_expert.up_proj"])
def test_a_flipped_bit_among_rounded_rows_is_found_by_the_source_alone(
    module: str, suffix: str, source: Make, copy: Make
) -> None:
    recipe = "fp8" if suffix == "weight" else "int4-rtn"
    folder = damage.unsigned(copy(recipe=recipe))
    assert verify_artifact(folder, open_folder(source())).ok
    damage.put(f"{module}.{suffix}", _second_bit)(folder)
    found = [one for one in verify_artifact(folder, open_folder(source())).findings if one.level == "error"]
    assert [(one.rule, one.where) for one in found] == [("weights", module)]
    assert "1 of 128 output rows are not what rounding makes of the source, the first is row 7" in found[0].message


def _second_bit(codes: torch.Tensor) -> torch.Tensor:
    codes.view(torch.uint8)[7, 9] ^= 2
    return codes


@pytest.mark.parametrize("known", ["manifest", "source alone"])
@pytest.mark.parametrize("name", SOLVED)
def test_damage_of_solved_matrices_is_found_by_the_source(
    name: str, known: str, source: Make, solved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(solved, tmp_path / "artifact"))
    SOLVED[name](folder)
    (damage.resigned if known == "manifest" else damage.unsigned)(folder)
    result = verify_artifact(folder, open_folder(source("scout", hidden_size=256, intermediate_size=256)))
    assert rules(result) == {"weights"}


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block"])
def test_matrices_that_are_zero_in_the_source(recipe: str, source: Make, tmp_path: Path) -> None:
    """Pruned and expanded models: right beside the source, worth a warning without it; two equal experts too."""
    from safetensors.torch import load_file, save_file

    origin = Path(shutil.copytree(source("scout", layout="unfused"), tmp_path / "source"))
    state = load_file(origin / "model.safetensors")
    for name in ("gate", "up", "down"):
        state[f"{damage.EXPERTS}2.{name}_proj.weight"].zero_()
        state[f"{damage.EXPERTS}3.{name}_proj.weight"].copy_(state[f"{damage.EXPERTS}1.{name}_proj.weight"])
    (origin / "model.safetensors").unlink()
    save_file(state, origin / "model.safetensors", {"format": "pt"})
    folder = run_plan(make_plan(open_folder(origin), load_recipe(recipe)), tmp_path / "artifact").out
    beside, alone = verify_artifact(folder, open_folder(origin)), verify_artifact(folder)
    assert beside.ok
    assert "dead" not in rules(beside, "warning")
    assert alone.ok
    assert {"dead", "duplicate"} <= rules(alone, "warning")


def test_files_that_only_the_library_refuses(copy: Make) -> None:
    folder = damage.unsigned(copy())
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].decode().rstrip().replace('{"format":"pt"}', '{"format":1}').encode()
    path.unlink()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert rules(verify_artifact(folder)) == {"shard"}


def test_the_reference_lists_every_rule() -> None:
    import re

    from l4pack.verify.findings import RULES

    text = (Path(__file__).parents[2] / "docs/reference/verify.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z_-]+)` \|", text, re.MULTILINE) == list(RULES)
