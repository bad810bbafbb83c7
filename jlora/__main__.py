"""`python -m jlora`: the same as the command `jlora`."""

import sys

from jlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
