"""Names read back: every tensor the catalogue lists, every tensor a format adds, and nothing else."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4pack.errors import SourceError
from l4pack.model.config import Llama4Config, known_config
from l4pack.model.names import SUFFIXES, Place, classify, split_suffix
from l4pack.model.tensors import TEXT_ONLY_NAMING, Naming, Role, catalogue

NESTED = Naming("model.language_model.", "lm_head", "model.vision_model.", "model.multi_modal_projector.")


@pytest.mark.parametrize("model", ["llama-4-scout", "llama-4-maverick"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("naming", [None, TEXT_ONLY_NAMING, NESTED], ids=["multimodal", "text-only", "nested"])
def test_every_name_of_the_catalogue_is_read_back(model: str, fused: bool, naming: Naming | None) -> None:
    layout = catalogue(known_config(model), naming, fused=fused)
    experts = {linear.tensor: linear.expert for linear in layout.linears if not fused}
    for spec in layout.tensors:
        assert classify(spec.name) == Place(spec.role, spec.layer, experts.get(spec.name)), spec.name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_tensor_a_format_adds_to_a_matrix_is_read_as_the_matrix(suffix: str) -> None:
    for linear in catalogue(_scout(), fused=False).linears[:60]:
        name = f"{linear.module}.{suffix}"
        assert classify(name) == Place(linear.role, linear.layer, linear.expert)
        assert split_suffix(name) == (linear.module, suffix)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("language_model.model.layers.7.self_attn.k_scale", Place(Role.ATTENTION, 7, None)),
        ("language_model.model.layers.7.self_attn.k_proj.k_scale", Place(Role.ATTENTION, 7, None)),
        ("model.layers.1.feed_forward.experts.gate_up_proj_scale", Place(Role.ROUTED_EXPERT, 1, None)),
        ("vision_model.model.layers.3.self_attn.q_proj.weight_scale", Place(Role.VISION, None, None)),
        ("norm.weight", Place(Role.NORM, None, None)),
    ],
)
def test_names_outside_the_catalogue(name: str, place: Place) -> None:
    assert classify(name) == place


def test_a_parameter_without_a_suffix_is_its_own_module() -> None:
    assert split_suffix("a.experts.gate_up_proj") == ("a.experts.gate_up_proj", "")


@pytest.mark.parametrize(
    "name",
    [
        "", "weight", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.rotary.inv_freq",
        "model.layers.0.mlp.gate_proj.weight", "model.layers.x.self_attn.q_proj.weight",
        "model.layers.0.feed_forward.experts.1.gate_proj.weight.extra", "mtp.layers.0.weight",
    ],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="not a tensor of Llama 4"):
        classify(name)


@given(st.text(max_size=80))
def test_any_text_is_placed_or_refused_and_nothing_else(name: str) -> None:
    with suppress(SourceError):
        assert isinstance(classify(name), Place)


def _scout() -> Llama4Config:
    return known_config("llama-4-scout")
