"""Entry of the `vtok` program: says which extra is missing, and turns expected errors into one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; exit code 2 for errors that vtok explains."""
    from vtok.errors import MissingExtraError, VtokError

    try:
        from vtok.eval.app import app
    except ImportError as error:
        sys.exit(f"vtok: {MissingExtraError(error.name or 'a dependency', 'eval')}")
    try:
        app()
    except VtokError as error:
        print(f"vtok: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
