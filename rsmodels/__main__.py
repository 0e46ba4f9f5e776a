"""`python -m rsmodels` is the command `rsmodels`."""

import sys

from rsmodels.cli import main

if __name__ == "__main__":
    sys.exit(main())
