"""Turn a recipe and a cluster profile into a plan."""
