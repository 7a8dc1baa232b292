"""Talking to the Hub, and believing none of its answers unchecked."""
