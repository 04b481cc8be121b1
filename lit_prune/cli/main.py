"""The entry point of the ``lit-prune`` command; imports torch, Lightning and transformers only for a verb that runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_prune.cli.answers import answer
from lit_prune.cli.failure import fail
from lit_prune.cli.signatures import FOLDER_VERBS
from lit_prune.errors import InputError


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; an error of the user ends it with one line and exit code 2, Ctrl-C with one line and 130."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        text = answer(args)
        if text is not None:
            print(text)
            sys.exit(0)
        if args[0] in FOLDER_VERBS:
            from lit_prune.packed import command

            return command.run(args[1:])
        from lit_prune.cli.parser import run

        run(args)
    except KeyboardInterrupt:
        print("lit-prune: interrupted", file=sys.stderr)
        sys.exit(130)  # 128 and the number of SIGINT, as shells have it
    except InputError as error:
        fail(str(error))
    except Exception as error:
        from lit_prune.cli.errors import one_line

        message = one_line(error)
        if message is None:
            raise
        fail(message)


if __name__ == "__main__":
    main()
