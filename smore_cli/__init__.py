"""smore: fine-tune language models with mixtures of low-rank experts."""

__version__ = "0.1.0"
