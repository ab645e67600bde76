"""`./demo`, or `python examples/demo` where bitdial is installed with its extra `demo`."""

import sys

from walk import main

if __name__ == "__main__":
    sys.exit(main())
