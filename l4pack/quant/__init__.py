"""The numeric core: schemes, scales, rounding, packing. Pure functions on arrays; no files, no terminal."""
