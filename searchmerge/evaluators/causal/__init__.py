"""Causal language models: scoring continuations and generating them, with little waste."""
