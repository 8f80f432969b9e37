"""Entry point of ``amlaunch`` and ``python -m amlaunch.launcher``."""

from __future__ import annotations

import sys

from amlaunch.recipes.errors import BAD_INPUT, FAILED, INTERRUPTED, BadInput
from amlaunch.recipes.output import PIPE_CLOSED, tolerate_unreadable_output


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; invalid input is one message and exit code 2, never a traceback."""
    from amlaunch.launcher.cli import run

    tolerate_unreadable_output()
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        # Flushed here, where errors are still reported.
        sys.stdout.flush()
        return code
    except BadInput as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # For example: amlaunch logs … | head.
        sys.stderr.close()
        return PIPE_CLOSED
    except OSError as error:
        # A full disk, a folder that was deleted.
        print(f"error: {error.filename or 'this machine'}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        # Most commands never call Slurm.
        from amlaunch.launcher.errors import SlurmError, SlurmNotInstalled

        if not isinstance(error, SlurmError):
            raise
        print(f"error: {error.report}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, SlurmNotInstalled) else FAILED


if __name__ == "__main__":
    sys.exit(main())
