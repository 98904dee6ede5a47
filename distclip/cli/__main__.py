"""`python -m distclip.cli`, where the script `distclip` is not on the path."""

from __future__ import annotations

import sys

from distclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
