"""Speed and memory options of a model: compilation, fp8, attention kernels, activation checkpointing."""
