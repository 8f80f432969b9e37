"""What to run: the recipe format, the recipes that come with amlaunch, and the shape of a run directory.

The lowest room of the house: every other package may import it, it imports
nothing but the standard library and pyyaml.
"""
