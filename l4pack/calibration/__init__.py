"""Calibration: a text runs through the model layer by layer, and every matrix is solved for the inputs it really sees."""
