"""Metrics of a step: timing, reading numbers back from the device, and where they are written."""
