"""Whether an artifact is what it says it is."""
