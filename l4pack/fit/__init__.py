"""Choosing a scheme for every part of a model: the least predicted KL under a budget of bytes."""
