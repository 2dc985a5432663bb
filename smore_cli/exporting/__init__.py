"""Adapters and merged models in the formats of other programs."""
