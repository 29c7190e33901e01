"""Checkpoints: opening base models and experts, and writing merged models."""
