"""Metrics of a training step: timing, copying numbers from the device, and writing them."""
