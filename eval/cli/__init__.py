"""Entry of the `vtok` program: says which extra is missing, and turns expected errors into one line."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Runs the command line; exit code 2 for errors that vtok explains."""
    from vtok.errors import MissingExtraError, VtokError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text

    try:
        from vtok.eval.cli.program import app
    except ImportError as error:
        sys.exit(f"vtok: {MissingExtraError(error.name or 'a dependency', 'eval')}")
    try:
        from vtok.eval.common import launch
        from vtok.eval.common.distributed import world_size

        if world_size() > 1:
            launch.run_member(app)
        launch.check_launcher()
        app()
    except VtokError as error:
        print(f"vtok: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
