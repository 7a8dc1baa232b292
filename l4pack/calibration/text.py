"""The tokens a plan's calibration looks at."""

from __future__ import annotations

from l4pack.errors import SourceError
from l4pack.plan import Plan
from l4pack.stream.text import DEMO_CALIBRATION, TextChoice, load_text, load_tokenizer


def with_default_text(plan: Plan) -> Plan:
    """The plan with the text that is used when none is named: the one that comes with the package."""
    return with_text(plan, DEMO_CALIBRATION)


def with_text(plan: Plan, source: str) -> Plan:
    """The plan with a text's tokens, as many as its recipe asks for. Raises UsageError, SourceError (no tokenizer)."""
    asked = plan.recipe.calibration
    assert asked is not None
    try:
        tokenizer = load_tokenizer(plan.checkpoint)
    except SourceError as error:
        hint = f"{error.hint}; or take recipe int4-rtn, which needs no calibration"
        raise SourceError(f"calibration needs a tokenizer: {error.message}", hint=hint) from error
    choice = TextChoice(source, asked.samples, asked.sequence_length, asked.seed)
    return plan.with_text(load_text(choice, tokenizer, plan.checkpoint.config.text.max_position_embeddings))
