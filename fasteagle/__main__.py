"""What does `python -m fasteagle` run? The same commands as the `fasteagle` script."""

import sys

from fasteagle.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
