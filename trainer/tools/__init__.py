"""Tools beside training: export, text generation, benchmarks, memory planning and GPU checks."""
