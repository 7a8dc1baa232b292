"""Choosing what each part gets, so that the artifact fits and hurts least."""
