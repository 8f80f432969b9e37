"""Ranks and how a model is spread over them: data, tensor and context parallelism."""
