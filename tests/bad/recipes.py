"""Recipes that must not be read: the failure, the text of the file, and the message that names the key."""

GOOD = """\
name: mine
title: a recipe to be spoiled
schemes:
  int4: {format: pack-quantized, num_bits: 4, strategy: group, group_size: 128}
rules:
  - {roles: [routed_expert], scheme: int4}
  - {roles: all, scheme: keep}
"""

RECIPES: dict[str, tuple[str, str]] = {
    "unknown key": (GOOD + "observer: mse\n", r"observer: Extra inputs"),
    "unknown key in a scheme": (GOOD.replace("num_bits: 4", "num_bits: 4, bits: 4"), r"schemes\.int4\.bits"),
    "unknown role": (GOOD.replace("routed_expert", "experts"), r"rules\.0\.roles"),
    "bad number of bits": (GOOD.replace("num_bits: 4", "num_bits: 5"), r"schemes\.int4\.num_bits"),
    "bits in words": (GOOD.replace("num_bits: 4", "num_bits: four"), r"schemes\.int4\.num_bits"),
    "alias bomb": ("a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", "line 2: aliases are not allowed"),
    "repeated key": (GOOD + "title: again\n", "key 'title' appears twice"),
    "unused scheme": (GOOD.replace("rules:", "  fp8: {format: float-quantized, num_bits: 8, type: float, strategy: channel}\nrules:"), r"schemes\.fp8: no rule uses it"),
    "rule that matches nothing": (GOOD.replace("[routed_expert]", "[routed_expert], layers: [77]"), r"rules\.0 matches no tensor"),
    "rule behind one that takes all": (GOOD + "  - {roles: [router], scheme: keep}\n", r"rules\.2 matches no tensor"),
    "scheme on the router": (GOOD.replace("routed_expert", "router"), "no runtime reads a quantized router"),
    "scheme on the vision tower": (GOOD.replace("routed_expert", "vision"), "no runtime reads a quantized vision"),
    "tensors without a rule": (GOOD.replace("  - {roles: all, scheme: keep}\n", ""), "no rule speaks of"),
    "group that does not divide": (GOOD.replace("group_size: 128", "group_size: 64").replace("routed_expert", "shared_expert"), "group_size 64 does not divide the 96"),
    "code": ("name: !!python/name:os.system\n", "could not determine a constructor"),
    "nothing": ("", "does not hold keys and values"),
}  # fmt: skip
