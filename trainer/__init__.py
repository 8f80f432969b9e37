"""From tokens to a trained model: data order, models, parallelism, training loop, checkpoints, metrics, export.

Importing this package loads nothing heavy, so that ``python -m amlaunch.trainer`` can install its signal handlers
before torch loads, which takes seconds.
"""
