"""What to run: the recipe format, the recipes that come with amlaunch, and the shape of a run directory.

The lowest room of the house: every other package may import it, it imports
nothing but the standard library and pyyaml. All our processes import it first,
so here the packages that a run's snapshot brings along for an image that lacks
them join ``sys.path``: at its end, for what the image has itself comes first.
"""

import os
import sys

PACKAGES_FILE = "packages.json"
"""In the folder of these packages, ``code/packages``: their names and versions."""

_packages = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "packages")
if os.path.isfile(os.path.join(_packages, PACKAGES_FILE)) and _packages not in sys.path:
    sys.path.append(_packages)
