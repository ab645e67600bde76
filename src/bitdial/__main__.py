"""`python -m bitdial`: the command line without its installed script."""

import sys

from bitdial.cli import main

if __name__ == "__main__":
    sys.exit(main())
