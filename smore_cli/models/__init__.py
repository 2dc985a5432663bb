"""Backbones and adapters on disk: finding, loading, saving."""
