"""Run the command line with ``python -m amlaunch``."""

import sys

from amlaunch.launcher.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
