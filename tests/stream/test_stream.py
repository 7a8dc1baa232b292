"""Streaming a model layer by layer gives what transformers gives with the whole model loaded."""

from __future__ import annotations

import json
import shutil
import threading
from copy import deepcopy
from functools import partial

import pytest
import torch
import whole_model
from models import IMAGE_TOKEN
from safetensors.torch import load_file, save_file
from streaming import CPU, JOB, LENGTHS, assert_close, lanes_of, stream_model, streamed_logits, token_rows
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.errors import BudgetError, L4packError, StoppedError, UsageError
from l4pack.evaluate.answers import StreamAnswers
from l4pack.model.config import known_config, parse_config
from l4pack.plan.memory import Computing, computing_on, walk_within
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import AttendedRows, Packed, TokenSequence, batches
from l4pack.stream.layer import Blocks
from l4pack.stream.modules import upstream_config
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.work.identity import Identity
from l4pack.work.machine import ASKED, CONTAINER, Room


@pytest.mark.parametrize(
    "blocks", [Blocks.on(torch.device("cpu"), 5120), Blocks(attention=24, rows=50)], ids=["whole", "small-blocks"]
)
@pytest.mark.parametrize("layout", ["fused", "unfused"])
@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
def test_streamed_logits_are_transformers(checkpoint, tmp_path, kind, layout, blocks):
    sequences = token_rows()
    wanted = whole_model.logits(whole_model.load(checkpoint(kind)), sequences)
    assert_close(streamed_logits(checkpoint(kind, layout=layout, shards=3), sequences, tmp_path, blocks), wanted)


def test_streamed_demo_model_is_transformers(tmp_path):
    """A trained model: text longer than its attention chunk, and an image."""
    from l4pack.demo import model_path

    model = whole_model.load(model_path())
    vision, image_token = model.config.vision_config, model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 1500, (300,), generator=generator).tolist()]
    assert_close(streamed_logits(model_path(), texts, tmp_path / "text"), whole_model.logits(model, texts), 1e-4)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    patches = (vision.image_size // vision.patch_size) ** 2
    texts[0][5 : 5 + int(patches * vision.pixel_shuffle_ratio**2)] = [image_token] * int(
        patches * vision.pixel_shuffle_ratio**2
    )
    wanted = whole_model.logits(model, texts, pixel_values=pixels)
    assert_close(streamed_logits(model_path(), texts, tmp_path / "image", images=pixels), wanted, 1e-4)


@pytest.mark.parametrize("at_once", [1, 7])
def test_embeddings_come_a_few_tokens_at_a_time(checkpoint, tmp_path, monkeypatch, at_once):
    whole = streamed_logits(checkpoint("scout"), token_rows(), tmp_path / "whole")
    monkeypatch.setattr("l4pack.stream.embed.ROWS_AT_ONCE", at_once)
    parts = streamed_logits(checkpoint("scout"), token_rows(), tmp_path / "parts")
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_two_experts_a_token(checkpoint, tmp_path):
    source, sequences = checkpoint("scout", num_experts_per_tok=2), token_rows()
    wanted = whole_model.logits(whole_model.load(source), sequences)
    assert_close(streamed_logits(source, sequences, tmp_path), wanted)


def test_chunks_positions_and_temperature_matter(checkpoint, tmp_path):
    """The equality above would mean little if these made no difference to the tiny models."""
    sequences, plain = token_rows(), checkpoint("scout")
    found = streamed_logits(plain, sequences, tmp_path)[0]
    for change in ({"attention_chunk_size": 512}, {"no_rope_layers": [1, 1, 1, 1]}, {"attn_temperature_tuning": False}):
        other = streamed_logits(checkpoint("scout", **change), sequences, tmp_path / str(change))[0]
        assert (other - found).abs().max() > 1e-3, change


def test_images_are_embedded_at_their_tokens(checkpoint, tmp_path):
    source = checkpoint("scout")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ids = token_rows(lengths=(50,))[0]
    ids[3:11] = [IMAGE_TOKEN] * 8
    wanted = whole_model.logits(whole_model.load(source), [ids], pixel_values=pixels)
    assert_close(streamed_logits(source, [ids], tmp_path, images=pixels), wanted)
    without = streamed_logits(source, [ids], tmp_path / "without")[0]
    assert (without - wanted[0]).abs().max() > 0.1


def test_images_that_do_not_fit_their_tokens(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="0 image tokens stand for 4"):
        streamed_logits(checkpoint("scout"), token_rows(), tmp_path, images=torch.zeros(1, 3, 56, 56))


@pytest.mark.parametrize("recipe", ["int4-rtn", "meta-int4", "nvfp4"])
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_weight_only_artifact_is_transformers_in_bf16(artifact, tmp_path, kind, recipe):
    """Weights are rounded to BF16 as runtimes multiply them."""
    made, sequences = artifact(recipe, kind), token_rows()
    wanted = whole_model.logits(whole_model.load(made, quantized=True, dtype=torch.bfloat16), sequences)
    assert_close(streamed_logits(made, sequences, tmp_path), wanted)


def test_fp8_artifact_without_rounded_inputs_is_transformers(artifact, tmp_path):
    """`meta-fp8` has float32 scales, which transformers multiplies exactly; so do we."""
    made, sequences = artifact("meta-fp8"), token_rows()
    wanted = whole_model.logits(whole_model.load(made, quantized=True), sequences)
    assert_close(streamed_logits(made, sequences, tmp_path, round_activations=False), wanted)


def test_fp8_artifact_with_inputs_rounded_a_token(artifact, tmp_path):
    made, sequences = artifact("meta-fp8"), token_rows()
    model = whole_model.load(made, quantized=True)
    quantized = [name.removesuffix(".weight_scale") for name in open_folder(made).entries if name.endswith("_scale")]
    for name in quantized:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (_rounded_a_token(inputs[0]),))
    assert len(quantized) > 10
    assert_close(streamed_logits(made, sequences, tmp_path), whole_model.logits(model, sequences))


def _rounded_a_token(inputs):
    rows = []
    for row in inputs.reshape(-1, inputs.shape[-1]):
        scale = max(float(row.abs().max()) / 448, 1 / (448 * 512))
        rows.append((row / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.stack(rows).reshape(inputs.shape)


def test_a_stopped_walk_goes_on_to_the_same_states(checkpoint, tmp_path):
    sequences = token_rows()
    wanted = streamed_logits(checkpoint("maverick"), sequences, tmp_path / "whole")
    packed, model = Packed([TokenSequence(tuple(ids)) for ids in sequences]), stream_model(checkpoint("maverick"))
    for layer in (2, 3):
        progress = Progress()
        progress.label = lambda text, stop=progress.stop, at=f"layer {layer} of 4,": stop.set() if at in text else None
        with (
            Walk(lanes_of(model, packed), tmp_path / "work", JOB, progress=progress) as walk,
            pytest.raises(StoppedError),
        ):
            walk.run()
    with Walk(lanes_of(model, packed), tmp_path / "work", JOB) as walk:
        assert walk.resumed_layers == 2
        walk.run()
        assert len(walk.records) == 4
        answers = StreamAnswers(model, walk.streams["original"].current)
        rows = answers.normed(torch.arange(packed.rows)) @ answers.head(slice(0, answers.vocabulary)).T
    assert torch.equal(rows, torch.cat(wanted))


@pytest.mark.parametrize("stop_in", [None, 3])
def test_progress_ends_at_all_bytes(checkpoint, tmp_path, stop_in):
    """Experts without a token and layers done before count too."""
    from l4pack.evaluate.evaluate import total_bytes

    packed, model = Packed([TokenSequence((1, 2, 3))]), stream_model(checkpoint("maverick"))
    if stop_in:
        stopping = Progress()
        stopping.label = lambda text: stopping.stop.set() if f"layer {stop_in} of 4," in text else None
        with Walk(lanes_of(model, packed), tmp_path, JOB, progress=stopping) as walk, pytest.raises(StoppedError):
            walk.run()
    done = []
    with Walk(lanes_of(model, packed), tmp_path, JOB, progress=Progress(advance=done.append)) as walk:
        walk.run()
    assert sum(done) == total_bytes(model.weights.checkpoint, None)


def test_work_of_another_job_is_refused(checkpoint, tmp_path):
    streamed_logits(checkpoint("text"), token_rows(), tmp_path)
    packed, model = Packed([TokenSequence((1, 2, 3))]), stream_model(checkpoint("text"))
    with pytest.raises(UsageError, match="begun as another job: job was test and is another"):
        Walk(lanes_of(model, packed), tmp_path, Identity({"job": "another"}))


def test_a_damaged_state_file_means_beginning_again(checkpoint, tmp_path):
    sequences = token_rows()
    wanted = streamed_logits(checkpoint("text"), sequences, tmp_path)
    (tmp_path / "state.json").write_text('{"job": "job", "lay')
    assert torch.equal(torch.cat(streamed_logits(checkpoint("text"), sequences, tmp_path)), torch.cat(wanted))


@pytest.mark.parametrize(
    ("tensor", "index", "where"),
    [
        ("layers.2.feed_forward.experts.gate_up_proj", (1,), "layer 2, routed expert 1"),
        ("layers.1.feed_forward.shared_expert.up_proj.weight", (), "layer 1, shared expert"),
        ("layers.3.self_attn.o_proj.weight", (), "layer 3, attention"),
    ],
)
def test_a_weight_that_is_not_a_number_is_named(checkpoint, tmp_path, tensor, index, where):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint("scout"), broken)
    state = load_file(broken / "model.safetensors")
    state[f"language_model.model.{tensor}"][index] = torch.nan
    save_file(state, broken / "model.safetensors")
    with pytest.raises(L4packError, match=f"original: {where}: the output is infinite or not a number"):
        streamed_logits(broken, token_rows(), tmp_path / "work")


def test_a_token_outside_the_vocabulary(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="token 384, the model's vocabulary has 384"):
        streamed_logits(checkpoint("text"), [[1, 384]], tmp_path)


def test_configuration_without_weights():
    from l4pack.checkpoint.open import open_source

    with pytest.raises(L4packError, match="without weights"):
        Weights(open_source("llama-4-scout"), CPU, torch.float32)


def test_a_full_disk_is_said_before_the_walk(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(BudgetError, match="no room for"):
        streamed_logits(checkpoint("text"), token_rows(), tmp_path)


def test_pieces_cover_every_row_once():
    packed = Packed([TokenSequence((0,) * length) for length in LENGTHS])
    for chunk in (None, 32, 1):
        pieces = packed.pieces(chunk)
        assert [row for piece in pieces for row in range(piece.start, piece.start + piece.length)] == list(range(202))
    assert packed.pieces(32)[:3] == [AttendedRows(0, 32, 0), AttendedRows(32, 32, 32), AttendedRows(64, 16, 64)]


def test_scored_rows_see_the_token_before():
    packed = Packed([TokenSequence((5, 6, 7)), TokenSequence((1, 2, 3, 4), score_from=3)])
    assert packed.scored_rows().tolist() == [0, 1, 5]
    assert packed.targets().tolist() == [6, 7, 4]


def test_batches_keep_to_the_limit():
    pieces = [AttendedRows(0, length, 0) for length in (5, 5, 40, 3, 3, 3, 3)]
    sizes = [[piece.length for piece in batch] for batch in batches(pieces, 12)]
    assert sizes == [[5, 5], [40], [3, 3, 3, 3]]


def test_prefetch_loads_in_order_and_ahead_by_one():
    loaded, gate = [], threading.Event()

    def load(key):
        gate.wait(5)
        loaded.append(key)
        return key * 10

    with Prefetch(load) as ready:
        ready.plan([1, 2, 3])
        gate.set()
        assert ready.take(1) == 10
        assert ready.take(2) == 20
        ready.plan([4])
        with pytest.raises(RuntimeError, match="7 was asked for, but 3 is next"):
            ready.take(7)
    assert loaded[:2] == [1, 2]


def test_prefetch_passes_errors_on():
    def load(key):
        raise UsageError(f"can't load {key}")

    with Prefetch(load) as ready:
        ready.plan([1])
        with pytest.raises(UsageError, match="can't load 1"):
            ready.take(1)


def test_without_room_nothing_is_loaded_before_it_is_taken():
    loaded = []

    def load(key):
        loaded.append(key)
        return key

    with Prefetch(load, ahead=False) as ready:
        ready.plan([1, 2])
        for expected in ([1], [1, 2]):
            assert ready.take(expected[-1]) == expected[-1]
            assert loaded == expected


def test_a_walk_that_does_not_fit_is_refused():
    config, sequences = known_config("llama-4-maverick"), [TokenSequence((0,) * 2048)]
    computing = computing_on(Compute.of("cpu"), config, sequences, models=2, streams=2)
    needed = partial(Computing.memory, scored=True)
    most, ahead = walk_within(computing, needed, Room(8_000_000_000, ASKED))
    assert ahead
    assert most.ram <= 8_000_000_000
    least, ahead = walk_within(computing, needed, Room(most.ram - 1, ASKED))
    assert not ahead
    assert least.ram < most.ram
    with pytest.raises(BudgetError, match=r"at least .*, 2\.00 GB are there \(--max-ram\)") as refused:
        walk_within(computing, needed, Room(2_000_000_000, ASKED))
    assert "raise --max-ram" in refused.value.hint
    with pytest.raises(BudgetError, match="the container's memory limit"):
        walk_within(computing, needed, Room(2_000_000_000, CONTAINER))


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "gpu"])
def test_places_to_compute_that_are_not_there(name):
    with pytest.raises(UsageError):
        Compute.of(name)


def test_state_says_which_layer_is_done(checkpoint, tmp_path):
    streamed_logits(checkpoint("text"), token_rows(), tmp_path)
    assert json.loads((tmp_path / "state.json").read_bytes())["state"]["found"]["layers"] == 4


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
@pytest.mark.parametrize("text_only", [False, True])
def test_transformers_leaves_a_configuration_as_it_is(name, text_only):
    raw = known_config(name).raw
    if text_only:
        raw = {**raw["text_config"], "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    config = parse_config(deepcopy(raw))
    upstream_config(config)
    assert config.raw == raw
