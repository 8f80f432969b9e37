"""Read a recipe: YAML, sections and their checks, overrides, placeholders and targets."""
