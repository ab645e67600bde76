"""`python -m flexiq.demo`."""

import sys

from flexiq.demo import main

if __name__ == "__main__":
    sys.exit(main())
