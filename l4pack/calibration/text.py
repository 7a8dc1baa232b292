"""The tokens a plan's calibration looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4pack.errors import SourceError

if TYPE_CHECKING:
    from l4pack.plan.plan import Plan


def with_text(plan: Plan, source: str | None = None) -> Plan:
    """The plan with a text's tokens, as many as its recipe asks for; None: the text that comes with the package.

    Raises UsageError (the text), SourceError (no tokenizer).
    """
    # Imported here because commands import this module, and torch takes seconds.
    from l4pack.text.choice import DEMO_CALIBRATION, NAMED_SETS, TextChoice
    from l4pack.text.files import list_files
    from l4pack.text.images import ImageReader
    from l4pack.text.sequences import load_text
    from l4pack.text.tokenizer import load_tokenizer

    asked = plan.recipe.calibration
    assert asked is not None
    if source is not None and source not in NAMED_SETS:
        list_files(source)  # a missing text is told of before a missing tokenizer
    try:
        tokenizer = load_tokenizer(plan.checkpoint)
    except SourceError as error:
        hint = f"{error.hint}; or take recipe int4-rtn, which needs no calibration"
        raise SourceError(f"calibration needs a tokenizer: {error.message}", hint=hint) from error
    choice = TextChoice(
        DEMO_CALIBRATION if source is None else source, asked.samples, asked.sequence_length, asked.seed
    )
    longest = plan.checkpoint.config.text.max_position_embeddings
    return plan.with_text(load_text(choice, tokenizer, longest, ImageReader(plan.checkpoint)))
