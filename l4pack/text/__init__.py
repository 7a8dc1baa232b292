"""Rows of people's files to token sequences."""
