"""The one walk, by a visitor that only looks on: order, what is on disk when, going on, stopping, progress."""

from __future__ import annotations

import json
import re

import pytest
import torch
from spoil import SPOILS
from streaming import JOB, lanes_of, stream_model, token_rows

from l4pack.errors import StoppedError
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.kept import STATE_NAME
from l4pack.stream.lanes import Lane
from l4pack.stream.rows import LAYERS_KEPT
from l4pack.stream.units import Part, Unit, layer_units
from l4pack.stream.visitor import Progress, Visitor
from l4pack.stream.walk import Walk
from l4pack.work.seal import Seal, Span, unbroken

LAYERS = 4


class Seen(Visitor):
    """Notes what it is called for; `at` is called before a unit runs."""

    def __init__(self, at=lambda unit: None, believes=True):
        self.units, self.left, self.resumed = [], [], None
        self._at, self._believes = at, believes

    def resume(self, records):
        self.resumed = list(records)
        return self._believes

    def visit(self, visit, unit, weights):
        self._at(unit)
        self.units.append((visit.model, unit))
        super().visit(visit, unit, weights)

    def leave(self, layer, streams):
        self.left.append(layer)
        return {"layer": layer}


@pytest.fixture(scope="module")
def model(checkpoint):
    return stream_model(checkpoint("maverick"))


@pytest.fixture(scope="module")
def packed():
    return Packed([TokenSequence(tuple(ids)) for ids in token_rows()])


@pytest.fixture(scope="module")
def wanted(model, packed, tmp_path_factory):
    return outputs(lanes_of(model, packed), tmp_path_factory.mktemp("whole"))


def outputs(lanes, work, visitor=None, **options):
    """The last layer's outputs of the first lane."""
    with Walk(lanes, work, JOB, visitor, **options) as walk:
        walk.run()
        return walk.streams[lanes[0].name].current.data.clone()


def found_in(work):
    return json.loads((work / STATE_NAME).read_text())["state"]


def vouches(work):
    """Layers that the state says are done; all that it seals is on disk as it says."""
    state = found_in(work)
    seals = [Seal(**one) for one in state["seals"]]
    assert unbroken(work, [Span(one.file, one.start, one.nbytes) for one in seals], seals)
    assert len(seals) == (1 if state["found"]["layers"] else 0)
    return state["found"]["layers"]


def test_units_run_in_the_layers_order(model, packed, tmp_path):
    seen = Seen()
    outputs(lanes_of(model, packed), tmp_path, seen)
    config = model.skeleton.config
    assert seen.left == list(range(LAYERS))
    for layer in range(LAYERS):
        units = [unit for _, unit in seen.units if unit.layer == layer]
        assert units == [unit for unit in layer_units(config, layer) if unit in units]
        assert units[:2] == layer_units(config, layer)[:2]
        assert (len(units) > 2) == (layer in config.text.moe_layers)


def test_models_take_turns_in_a_layer_and_the_lanes_of_one_walk_together(checkpoint, model, packed, tmp_path):
    other = stream_model(checkpoint("maverick"), "other")
    seen = Seen()
    lanes = [*lanes_of(model, packed), Lane("again", model, packed), Lane("other", other, packed)]
    with Walk(lanes, tmp_path, JOB, seen) as walk:
        walk.run()
        first, *others = (stream.current.data for stream in walk.streams.values())
        assert all(torch.equal(first, one) for one in others)
    turns = [(unit.layer, number) for number, unit in seen.units]
    assert turns == sorted(turns)
    assert {number for number, _ in seen.units} == {0, 1}


@pytest.mark.parametrize("lanes", [1, 3])
def test_experts_run_that_the_visitor_asks_for(model, packed, tmp_path, wanted, lanes):
    seen = Seen()
    seen.experts = lambda visit, used: range(model.skeleton.config.text.num_local_experts)
    together = [Lane(f"lane {number}", model, packed, files="shared") for number in range(lanes)]
    assert torch.equal(outputs(together, tmp_path, seen), wanted)
    assert [unit for _, unit in seen.units] == [
        unit for layer in range(LAYERS) for unit in layer_units(model.skeleton.config, layer)
    ]
    assert len(list(tmp_path.glob("*.hidden"))) == 3


def test_the_state_says_only_what_is_on_disk(model, packed, tmp_path):
    """Whenever a unit runs, so whenever it could be killed."""
    said = []

    def look(unit):
        said.append((unit, vouches(tmp_path)))

    outputs(lanes_of(model, packed), tmp_path, Seen(look))
    for unit, layers in said:
        assert layers == unit.layer or (unit.part is Part.ATTENTION and layers == unit.layer - 1)
    assert vouches(tmp_path) == LAYERS


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_stopped_in_any_layer_it_goes_on_to_the_same_states(model, packed, tmp_path, wanted, layer, number):
    progress, lanes = Progress(), lanes_of(model, packed)
    last = layer_units(model.skeleton.config, layer)[number]
    with pytest.raises(StoppedError) as stopped:
        outputs(lanes, tmp_path, Seen(lambda unit: progress.stop.set() if unit == last else None), progress=progress)
    assert (stopped.value.exit_code, stopped.value.hint) == (75, "run the same command again to go on")
    assert stopped.value.message == "stopped; what is finished is kept"
    done, seen = vouches(tmp_path), Seen()
    assert done == (layer + 1 if last.part is Part.DENSE else layer)
    assert torch.equal(outputs(lanes, tmp_path, seen), wanted)
    assert seen.units[0] == (0, Unit(done, Part.ATTENTION))
    assert seen.resumed == ([{"layer": before} for before in range(done)] if done else None)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_whatever_it_dies_of_in_any_layer_it_goes_on_to_the_same_states(model, packed, tmp_path, wanted, layer, number):
    last, lanes = layer_units(model.skeleton.config, layer)[number], lanes_of(model, packed)

    def die(unit):
        if unit == last:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        outputs(lanes, tmp_path, Seen(die))
    assert vouches(tmp_path) == layer
    assert torch.equal(outputs(lanes, tmp_path), wanted)


@pytest.fixture(scope="module")
def deep(checkpoint):
    """Layers enough for three sides to be put on disk, and one more."""
    return stream_model(checkpoint("maverick", num_hidden_layers=10, no_rope_layers=[1, 1, 1, 0, 1] * 2))


@pytest.mark.parametrize("layer", [1, 2, 3, 5, 6, 8, 9])
def test_where_states_stay_on_a_device_it_goes_on_from_the_last_that_are_on_disk(deep, packed, tmp_path, layer):
    lanes, last = lanes_of(deep, packed), layer_units(deep.skeleton.config, layer)[1]
    whole = outputs(lanes, tmp_path / "whole", resident=True)
    assert torch.equal(whole, outputs(lanes, tmp_path / "files"))

    def die(unit):
        if unit == last:
            assert vouches(tmp_path) == layer // LAYERS_KEPT * LAYERS_KEPT
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        outputs(lanes, tmp_path, Seen(die), resident=True)
    seen = Seen()
    assert torch.equal(outputs(lanes, tmp_path, seen, resident=True), whole)
    done = layer // LAYERS_KEPT * LAYERS_KEPT
    assert seen.units[0] == (0, Unit(done, Part.ATTENTION))
    assert seen.resumed == ([{"layer": before} for before in range(done)] if done else None)


def test_what_a_visitor_does_not_believe_is_walked_again(model, packed, tmp_path, wanted):
    lanes = lanes_of(model, packed)
    outputs(lanes, tmp_path)
    seen = Seen(believes=False)
    assert torch.equal(outputs(lanes, tmp_path, seen), wanted)
    assert len(seen.resumed) == LAYERS
    assert seen.left == list(range(LAYERS))


def test_other_lanes_begin_again(model, packed, tmp_path, wanted):
    outputs(lanes_of(model, packed), tmp_path)
    seen = Seen()
    assert torch.equal(outputs([Lane("other", model, packed)], tmp_path, seen), wanted)
    assert seen.resumed is None


@pytest.mark.parametrize("stop_in", [None, 0, 2])
def test_progress_counts_every_unit_once_whether_it_runs_or_not(model, packed, tmp_path, stop_in):
    lanes, progress, counted, labels, steps = lanes_of(model, packed), Progress(), [], [], []
    if stop_in is not None:
        stop = Seen(lambda unit: progress.stop.set() if unit.layer == stop_in else None)
        with pytest.raises(StoppedError):
            outputs(lanes, tmp_path, stop, progress=progress)
    seen = Seen()
    seen.size = lambda model, unit: 1 + 1000 * (unit.part is Part.ATTENTION)
    outputs(lanes, tmp_path, seen, progress=Progress(counted.append, labels.append, steps.append))
    units = sum(len(layer_units(model.skeleton.config, layer)) for layer in range(LAYERS))
    assert sum(counted) == units + 1000 * LAYERS
    assert labels[0] == f"layer {(stop_in or 0) + 1} of 4, attention"
    assert re.fullmatch(r"layer 4 of 4, (dense mlp|expert \d+ of \d+)", labels[-1])
    assert [step.partition(",")[0] for step in steps] == [f"layer {n + 1} of 4 done" for n in range(stop_in or 0, 4)]


def test_a_lane_walks_the_layers_it_is_in(model, packed, tmp_path, wanted):
    """One begins with the outputs that the visitor gives it, one ends before the others."""

    class Late(Seen):
        def leave(self, layer, streams):
            if layer == 1:
                streams["late"].following.data[:] = streams["original"].following.data
            return super().leave(layer, streams)

        def routed(self, visit):
            passes.append((visit.layer, tuple(visit.passes)))

    passes = []
    lanes = [*lanes_of(model, packed), Lane("late", model, packed, begins=2), Lane("brief", model, packed, ends=2)]
    with Walk(lanes, tmp_path, JOB, Late()) as walk:
        walk.run()
        assert torch.equal(walk.streams["late"].current.data, wanted)
        assert torch.equal(walk.streams["original"].current.data, wanted)
    assert passes == [(1, ("original", "brief")), (3, ("original", "late"))]
    assert {seal["file"] for seal in found_in(tmp_path)["seals"]} == {"original-0.hidden", "late-0.hidden"}


@pytest.mark.parametrize("damage", [None, "flipped", "removed"])
def test_a_later_walk_begins_with_what_was_kept_for_it(model, packed, tmp_path, wanted, damage):
    lanes = [Lane("original", model, packed, kept=True)]
    outputs([*lanes, Lane("first", model, packed)], tmp_path, keep=2)
    if damage:
        SPOILS[damage](tmp_path / "original-kept.hidden")
    seen = Seen()
    assert torch.equal(outputs([*lanes, Lane("second", model, packed, begins=3)], tmp_path, seen, first=2), wanted)
    assert seen.left == list(range(0 if damage else 2, LAYERS))
    assert found_in(tmp_path)["found"]["kept"] == (None if damage else 2)
