"""How well an artifact answers like its original: paired numbers, error bars, gates and reports."""
