"""Wording, live progress and summaries."""
