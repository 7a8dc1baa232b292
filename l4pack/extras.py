"""What an install may leave out, and the one line that says how to get it.

The core reads headers and plans. Every library in this table belongs to an extra of pyproject.toml.
"""

from __future__ import annotations

from l4pack.errors import UsageError

CORE = "inspect, plan, budget, licence, recipes, formats, devices and verify --headers-only"
EXTRAS = {
    "quantize": (
        "compressed_tensors",
        "numba",
        "numpy",
        "optimum",
        "safetensors",
        "scipy",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "hub": ("huggingface_hub", "httpx", "httpx2"),
    "report": ("jinja2", "markupsafe", "matplotlib"),
    "gguf": ("gguf",),
}
"""Libraries that commands import when they run, by the extra that brings them first."""


def missing_part(error: ModuleNotFoundError) -> UsageError | None:
    """What to tell the user when a library of an extra could not be imported; None when it is of none."""
    library = (error.name or "").partition(".")[0]
    extra = next((name for name, libraries in EXTRAS.items() if library in libraries), None)
    if extra is None:
        return None
    return UsageError(
        f"this needs {library}, which a light install leaves out: pip install 'l4pack[all]'",
        hint=f"'l4pack[{extra}]' is the part with it; the core does {CORE}",
    )
