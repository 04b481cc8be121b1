"""``python -m lit_prune.cli`` is the ``lit-prune`` command."""

from lit_prune.cli.main import main

main()
