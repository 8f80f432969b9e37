"""Programs beside training: export, generate, benchmarks, memory planning and GPU checks."""
