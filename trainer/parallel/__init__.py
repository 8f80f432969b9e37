"""Ranks and the sharding of a model over them: data, tensor and context parallelism."""
