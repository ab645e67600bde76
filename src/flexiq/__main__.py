"""`python -m flexiq`: the command line without its installed script."""

import sys

from flexiq.cli import main

if __name__ == "__main__":
    sys.exit(main())
