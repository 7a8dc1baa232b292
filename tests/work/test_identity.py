"""What a job is, and what is said of one that is another."""

from l4pack.work.identity import Identity, flat


def test_the_order_of_parts_does_not_matter():
    assert Identity({"a": 1, "b": [2]}).digest == Identity({"b": [2], "a": 1}).digest
    assert Identity({"a": 1}).digest != Identity({"a": 2}).digest
    assert Identity({"a": 1}).digest != Identity({"b": 1}).digest


def test_changes_name_each_part_that_differs():
    now = Identity({"--seed": 1, "--samples": 4, "device": "cpu"})
    assert not Identity({"--new": 1}, {"--old": "--new"}).changes({"--old": 1})
    assert Identity({"--new": 1}, {"--old": "--new"}).changes({"--old": 2}) == ["--new was 2 and is 1"]
    assert now.changes({"--seed": 0, "--samples": 4}) == ["--seed was 0 and is 1", "device was not given and is cpu"]
    assert not Identity({"--new": 1}, {"--old": "--new"}).changes({"--old": 1})
    assert Identity({"--new": 1}, {"--old": "--new"}).changes({"--old": 2}) == ["--new was 2 and is 1"]
    assert now.changes(dict(now.parts)) == []


def test_values_that_look_the_same_are_said_to_have_changed():
    assert Identity({"x": "a" * 64 + "1"}).changes({"x": "a" * 64 + "2"}) == ["x has changed"]


def test_a_recipe_becomes_parts_by_its_keys():
    assert flat({"a": {"b": 1}, "c": [2]}, "recipe") == {"recipe.a.b": 1, "recipe.c": [2]}
