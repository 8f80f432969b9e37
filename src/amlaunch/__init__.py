"""amlaunch takes one YAML recipe from raw text to a trained language model.

The parts of this package are the folders at the top of the repository; here they are links to them (docs/design.md).

Every amlaunch process imports this module first. So this is where the packages that a run's code snapshot brings along
for an image that lacks them join ``sys.path``: at its end, because what the image has itself comes first.
"""

import os
import sys

PACKAGES_FILE = "packages.json"
"""Names and versions of the packages in a snapshot's ``packages`` folder."""

_packages = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "packages")
if os.path.isfile(os.path.join(_packages, PACKAGES_FILE)) and _packages not in sys.path:
    sys.path.append(_packages)
