"""``python -m snparam``."""

import sys

from snparam.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
