"""``python -m klfast`` is the command ``klfast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
