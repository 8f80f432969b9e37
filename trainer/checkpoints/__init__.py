"""Checkpoints: layout, saving, loading, and Hugging Face folders."""
