"""`python -m bitdial.demo`."""

import sys

from bitdial.demo import main

if __name__ == "__main__":
    sys.exit(main())
