"""Merging: task vectors, their statistics, merge methods, and the engine that applies them."""
