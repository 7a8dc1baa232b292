"""Turn a full Llama 4 checkpoint into a verified Int4 or FP8 artifact."""

__version__ = "0.1.0"
