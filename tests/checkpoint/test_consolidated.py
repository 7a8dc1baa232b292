"""Meta's release as a source: every number where transformers has it, artifacts of the same bytes, and clear refusals."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import file_digests
from hub_repository import REPO, own_cache  # noqa: F401
from hub_server import running_hub
from killing import Killed, killed_after
from meta_release import write_release

from l4pack.checkpoint.hub import open_hub
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.reader import Reader
from l4pack.demo import model_path
from l4pack.errors import SourceError, UsageError
from l4pack.model.config import known_config, parse_config
from l4pack.model.original import Widths
from l4pack.model.params import configuration, parse_params
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.verify.verify import verify_artifact

KINDS = {"demo-8": ("demo", 8), "demo-2": ("demo", 2), "maverick-8": ("maverick", 8), "maverick-2": ("maverick", 2),
         "text-1": ("text", 1)}  # fmt: skip
SPLIT = "layers.0.attention.wo.weight"


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    """A checkpoint of transformers' and Meta's release of the same, by a name of KINDS; each is made once."""
    made = {}

    def once(name):
        if name not in made:
            kind, shards = KINDS[name]
            source = model_path() if kind == "demo" else checkpoint(kind)
            made[name] = source, write_release(source, tmp_path_factory.mktemp("releases") / name, shards)
        return made[name]

    return once


@pytest.fixture
def release(pair, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pair("maverick-2")[1], tmp_path / "release")


@pytest.mark.parametrize("name", KINDS)
def test_every_number_is_where_transformers_has_it(pair, name):
    source, folder = pair(name)
    theirs, ours = open_source(str(source)), open_source(str(folder))
    assert list(ours.layout.by_name) == list(theirs.layout.by_name)
    assert "consolidated" in ours.kind
    with Reader(theirs.entries, theirs.store.path) as first, Reader(ours.entries, ours.store.path) as second:
        for tensor in theirs.entries:
            assert np.array_equal(first.tensor(tensor), second.tensor(tensor)), tensor
        one, other = matrices_of(theirs, first), matrices_of(ours, second)
        for linear in ours.layout.linears[:60]:
            rows = slice(16, 32)
            (left,), (right,) = (source.slab([linear], rows).blocks() for source in (one, other))
            assert np.array_equal(left.out_in, right.out_in), linear.module
            assert one.nbytes(linear) == other.nbytes(linear)


@pytest.mark.parametrize(
    ("name", "recipe"), [("demo-8", "int4-rtn"), ("maverick-2", "fp8"), ("maverick-8", "int4-rtn")]
)
def test_artifacts_of_either_are_the_same_bytes(pair, tmp_path, name, recipe):
    source, folder = pair(name)
    made = []
    for number, opened in enumerate((open_source(str(source)), open_source(str(folder), companions=str(source)))):
        plan = make_plan(opened, load_recipe(recipe))
        out = run_plan(plan, tmp_path / f"out{number}").out
        assert sum(path.stat().st_size for path in out.iterdir()) == plan.artifact_bytes
        made.append({file: digest for file, digest in file_digests(out).items() if file != "l4pack-manifest.json"})
    assert made[0] == made[1]
    assert verify_artifact(out, open_source(str(folder))).ok
    assert verify_artifact(out, open_source(str(source))).ok


def test_killed_and_gone_on(pair, tmp_path, monkeypatch):
    _, folder = pair("maverick-2")
    whole = run_plan(make_plan(open_source(str(folder)), load_recipe("int4-rtn")), tmp_path / "whole").out
    with monkeypatch.context() as context:
        killed_after(context, 1)
        with pytest.raises(Killed):
            run_plan(make_plan(open_source(str(folder)), load_recipe("int4-rtn")), tmp_path / "out")
    result = run_plan(make_plan(open_source(str(folder)), load_recipe("int4-rtn")), tmp_path / "out")
    assert result.resumed_bytes > 0
    assert file_digests(result.out) == file_digests(whole)


def test_a_shard_that_changed_stops_the_job(release, tmp_path):
    plan = make_plan(open_source(str(release)), load_recipe("int4-rtn"))
    respell(release, lambda rank, state: {**state, "norm.weight": state["norm.weight"][:-1]})
    with pytest.raises(SourceError):
        run_plan(plan, tmp_path / "out")


@pytest.mark.parametrize("as_you_go", [True, False])
def test_from_the_hub(pair, tmp_path, as_you_go):
    _, folder = pair("maverick-2")
    local = run_plan(make_plan(open_source(str(folder)), load_recipe("int4-rtn")), tmp_path / "local").out
    with running_hub() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
        fetched = tmp_path / "out.partial" / "fetched"
        opened = open_hub(REPO, endpoint=hub.endpoint, fetch_as_you_go=as_you_go, folder=fetched if as_you_go else None)
        assert not [seen for seen in hub.requests("pth$", "GET") if seen.byte_range is None]
        plan = make_plan(opened, load_recipe("int4-rtn"))
        out = run_plan(plan, tmp_path / "out").out
        whole = [seen.path for seen in hub.requests("pth$", "GET") if seen.byte_range is None]
        assert len(whole) == len(set(whole)) == 2
    assert {**file_digests(out), "l4pack-manifest.json": ""} == {**file_digests(local), "l4pack-manifest.json": ""}
    if as_you_go:
        assert plan.disk_bytes >= plan.artifact_bytes + opened.weight_bytes


def respell(folder, change):
    """Write the shards anew, after `change` made something else of each one's state."""
    for rank, path in enumerate(sorted(folder.glob("consolidated.*"))):
        state = torch.load(path, weights_only=False)
        torch.save(change(rank, state), path)


AS_MODULES = {
    "attention.wqkv.layer_norm_weight": "attention_norm.weight", "feed_forward.norm.weight": "ffn_norm.weight",
    "feed_forward.mlp.layer_norm_weight": "ffn_norm.weight", "feed_forward.mlp.fc2_weight": "feed_forward.w2.weight",
    "w_in_shared_FD": "shared_expert.w1", "w_swiglu_FD": "shared_expert.w3", "w_out_shared_DF": "shared_expert.w2",
    "moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2",
}  # fmt: skip


def as_modules(rank, state):
    """What llama-models' load hooks make of a shard: the names of its modules, nothing stacked, experts 3-D."""
    found = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "fc1_weight":
            gate, up = value.chunk(2)
            found |= {f"{prefix.removesuffix('.mlp')}.{one}.weight": part for one, part in (("w1", gate), ("w3", up))}
        elif name.endswith("attention.wqkv.weight"):
            rows = value.shape[0] // 8
            found |= zip((f"{prefix[:-4]}w{one}.weight" for one in "qkv"), value.split([4 * rows, 2 * rows, 2 * rows]),
                         strict=True)  # fmt: skip
        else:
            for old, new in AS_MODULES.items():
                name = name.replace(old, new) if f".{old}" in name else name
            found[name] = value.unflatten(0, (8, -1)) if ".experts." in name else value
    return found


def by_width(rank, state):
    """The embedding split by its width, which other releases do."""
    return {**state, "tok_embeddings.weight": torch.arange(384 * 64).reshape(384, 64).bfloat16() + 1024 * rank}


def turned(rank, state):
    """The same numbers, stored the other way round or within larger storages."""
    odd = {name: value.T.contiguous().T for name, value in state.items() if getattr(value, "ndim", 0) == 2}
    even = {name: torch.cat([value, value])[: len(value)] for name, value in list(odd.items())[::2]}
    return {**state, **odd, **even}


@pytest.mark.parametrize("change", [as_modules, turned, lambda _, state: {"rope.freqs": torch.ones(2), **state}])
def test_other_names_and_strides_are_the_same_model(pair, release, change):
    wanted = open_source(str(pair("maverick-2")[0]))
    respell(release, change)
    found = open_source(str(release))
    with Reader(wanted.entries, wanted.store.path) as first, Reader(found.entries, found.store.path) as second:
        for tensor in wanted.entries:
            assert np.array_equal(first.tensor(tensor), second.tensor(tensor)), tensor
        for linear in wanted.layout.linears[:40]:
            (left,), (right,) = (
                matrices_of(one, reader).slab([linear], slice(0, 16)).blocks()
                for one, reader in ((wanted, first), (found, second))
            )
            assert np.array_equal(left.out_in, right.out_in), linear.module


def test_an_embedding_split_by_its_width(release):
    respell(release, by_width)
    found = open_source(str(release))
    name = found.layout.naming.embedding
    with Reader(found.entries, found.store.path) as reader:
        whole = torch.cat([by_width(rank, {})["tok_embeddings.weight"] for rank in range(2)], 1)
        assert np.array_equal(reader.tensor(name), whole.view(torch.int16).numpy().view(np.uint16))


# What spoils a copy, and what is said.
def without(name):
    return lambda folder: respell(
        folder, lambda rank, state: {key: value for key, value in state.items() if rank == 0 or key != name}
    )


def changed(name, change):
    return lambda folder: respell(folder, lambda rank, state: {**state, name: change(state.get(name), rank)})


def renamed(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def copied(old, new):
    return lambda folder: shutil.copy(folder / old, folder / new)


def with_params(**values):
    def spoil(folder):
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps({**params, **values}))

    return spoil


FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
SPOILED = {
    "no params.json": (lambda folder: (folder / "params.json").unlink(), "params.json"),
    "params.json is text": (lambda folder: (folder / "params.json").write_text("x"), "not a JSON object"),
    "a list": (lambda folder: (folder / "params.json").write_text("[1]"), "not a JSON object|params.json"),
    "a width that is none": (with_params(dim="wide"), "params.json: dim"),
    "another width": (with_params(dim=64), "has shape|are there"),
    "another number of layers": (with_params(n_layers=2), "not part of the Llama 4 model"),
    "more layers": (with_params(n_layers=6), "implies are in no shard"),
    "another vocabulary": (with_params(vocab_size=99), "vocab_size is 99, the shards' head has 384"),
    "a billion layers": (with_params(n_layers=10**9), "params.json: n_layers"),
    "quantized": (
        with_params(quantization_args={"scheme": "int4_weight_int8_dynamic_activation"}),
        "quantization_args",
    ),
    "with adapters": (with_params(lora_args={"rank": 8, "scale": 2.0}), "lora_args"),
    "the last shard is missing": (lambda folder: (folder / SECOND).unlink(), "1 shards are there, .* split over 2"),
    "the first shard is missing": (lambda folder: (folder / FIRST).unlink(), "shard 00 .* is missing"),
    "a gap": (renamed(SECOND, "consolidated.04.pth"), "shard 01 .* is missing"),
    "a number twice": (copied(SECOND, "consolidated.1.pth"), "shard 01 .* more than once"),
    "one more": (copied(SECOND, "consolidated.02.pth"), "is consolidated.01.pth again"),
    "a shard is another's copy": (copied(FIRST, SECOND), "consolidated.01.pth is consolidated.00.pth again"),
    "scales of llama-models": (
        lambda folder: (folder / "fp8_scales_0.pt").write_bytes(b""),
        "quantized by llama-models",
    ),
    "packed experts": (changed(SPLIT, lambda value, _: value.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    "no tensor": (changed("layers.0.x", lambda *_: [1, 2]), "layers.0.x is not a tensor"),
    "another model's weight": (changed("layers.0.attention.wz.weight", lambda *_: torch.zeros(2)), "not part of the"),
    "a weight that one shard lacks": (without("norm.weight"), "has no norm.weight"),
    "a weight that none has": (
        lambda folder: respell(folder, lambda _, state: {k: v for k, v in state.items() if k != "norm.weight"}),
        "1 weights that params.json implies",
    ),
    "half an expert": (
        lambda folder: respell(folder, lambda _, state: {k: v for k, v in state.items() if "swiglu_eD" not in k}),
        "only a part",
    ),
    "a weight under both names": (
        changed("layers.0.attention_norm.weight", lambda *_: torch.zeros(128).bfloat16()),
        "the same weight twice",
    ),
    "misshapen": (changed("output.weight", lambda value, rank: value[rank:]), "has shape|vocab_size"),
    "two dtypes": (changed(SPLIT, lambda value, rank: value.float() if rank else value), "another dtype"),
    "copies that differ": (changed("norm.weight", lambda value, rank: value + rank), "another norm.weight than"),
    "a router that differs": (
        changed("layers.1.feed_forward.router_DE", lambda value, rank: value + rank),
        "another layers.1.feed_forward.router_DE",
    ),
    "no weights": (lambda folder: respell(folder, lambda *_: {}), "holds no weights"),
    "not finite": (changed("norm.weight", lambda value, _: value * float("nan")), "infinite or NaN"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_release_is_refused_in_one_line(release, tmp_path, l4pack, spoil, message):
    spoil(release)
    ended = l4pack("quantize", release, "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert ended.code == 4, ended
    error, hint = ended.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()
    assert re.search(message, error), error


def test_companions_from_elsewhere(pair, tmp_path, l4pack):
    source, _ = pair("maverick-2")
    bare = write_release(source, tmp_path / "bare", 2, companions=False)
    missing = [one["file"] for one in json.loads(l4pack("inspect", bare, "--json").out)["missing"]]
    assert "tokenizer.json" in missing
    record = json.loads(l4pack("inspect", bare, "--companions", source, "--json").out)
    assert "tokenizer.json" not in [one["file"] for one in record["missing"]]
    assert record["max_context"] == 1024
    assert record["layout"].startswith("Meta's release")
    ended = l4pack("coverage", bare, "--calibration-samples", 1)
    assert ended.code == 4
    assert "--companions" in ended.err
    assert l4pack("inspect", bare, "--companions", tmp_path / "none").code == 4
    (tmp_path / "empty").mkdir()
    assert "no tokenizer" in l4pack("inspect", bare, "--companions", tmp_path / "empty").err
    with pytest.raises(UsageError, match="without weights"):
        open_source("llama-4-scout", companions=str(source))


def test_companions_of_another_model_are_refused(pair):
    with pytest.raises(SourceError, match=r"config.json: .* params.json and the shards make it"):
        open_source(str(pair("maverick-2")[1]), companions=str(model_path()))


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
def test_the_released_models_configuration(name):
    """Of what Meta's params.json says: all that the Hub's config.json says, but for the instruct models' context."""
    scout, text = name == "llama-4-scout", known_config(name).raw["text_config"]
    params = {
        "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "head_dim": 128, "norm_eps": 1e-5, "ffn_exp": 4.0,
        "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "rope_theta": 500000.0, "use_scaled_rope": scout,
        "nope_layer_interval": 4, "use_qk_norm": scout, "attention_chunk_size": 8192,
        "moe_args": {"num_experts": 16 if scout else 128, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                     "interleave_moe_layer_step": 1 if scout else 2},
        "vision_args": {"image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14},
                        "dim": 1408, "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096,
                        "pixel_shuffle_ratio": 0.5},
    }  # fmt: skip
    for raw in (params, {"model": params}):
        found = configuration(parse_params(json.dumps(raw).encode(), "x"), Widths(202048, 8192, None), "bfloat16")
        assert found["text_config"].pop("max_position_embeddings") == 262144
        wanted = {
            **known_config(name).raw,
            "text_config": {k: v for k, v in text.items() if k != "max_position_embeddings"},
        }
        assert found == wanted
    assert parse_config({**found, "text_config": text}) == known_config(name)
