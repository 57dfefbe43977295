"""``python3 -m governor``: the command line, with nothing installed."""

from __future__ import annotations

import sys

from governor._cli import main

if __name__ == "__main__":
    sys.exit(main())
