"""Image names, registries, saved images, and the folder of converted images."""
