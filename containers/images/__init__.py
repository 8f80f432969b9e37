"""Image names, registries, layers and the folder of converted images."""
