"""What was taken of a text and what was left, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_lines(record: Mapping[str, Any]) -> list[str]:
    """Lines about a text's record: what was taken; then, if anything, what was left."""
    rows = record.get("rows")
    many = "sequence" if record["sequences"] == 1 else "sequences"
    lines = [f"{record['source']}: {record['tokens']:,} tokens in {record['sequences']:,} {many}"]
    if record.get("images"):
        lines[0] += f", {record['image_tokens']:,} of them for {record['images']:,} images"
    if rows is None:
        return lines
    lines[0] += f", of {rows['used']:,} of {rows['read']:,} {'row' if rows['read'] == 1 else 'rows'}"
    left = [f"{record['tokens_left']:,} tokens not drawn"] if record["tokens_left"] else []
    reasons = {
        "empty": "empty",
        "with_images": "with images in no file, or sound",
        "with_images_too_long": "with images, longer than a sequence",
    }
    left += [
        f"{rows[key]:,} {'row' if rows[key] == 1 else 'rows'} {words}"
        for key, words in reasons.items()
        if rows.get(key)
    ]
    files = record.get("files", {})
    if files.get("left"):
        names = ", ".join(files["left_names"]) + (" and others" if files["left"] > len(files["left_names"]) else "")
        left.append(f"{files['left']:,} {'file' if files['left'] == 1 else 'files'} ({names})")
    if not record.get("read_to_end", True):
        left.append("what comes after the first part of a large text")
    return lines if not left else [*lines, f"left: {'; '.join(left)}"]
