"""The command line: `distclip plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command that `args` name. Returns the exit code."""
    import tyro
    from rich.console import Console

    from distclip.cli.console import UserError
    from distclip.cli.plan import Plan

    command = tyro.extras.subcommand_cli_from_dict({"plan": Plan}, args=args, prog="distclip")
    try:
        result = command.run()
    except UserError as error:
        print(f"distclip plan: error: {error}", file=sys.stderr)
        return 2
    if command.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        Console().print(result)
    return 0
