"""Running a model layer by layer: weights by slices, hidden states on disk. Evaluation and calibration both walk it."""
