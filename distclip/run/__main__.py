"""`python -m distclip.run`."""

from __future__ import annotations

from distclip.run import main

main()
