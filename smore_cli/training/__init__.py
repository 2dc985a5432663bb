"""The accelerate-based trainer."""
