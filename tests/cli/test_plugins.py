"""Rooms that nothing else imports are imported for their short names."""

import subprocess
import sys


def test_short_names_of_every_room_are_known() -> None:
    program = (
        "import lit_prune.cli.plugins\n"
        "from lit_prune.prune.base import Method\n"
        "print(*sorted(kind.__name__ for kind in Method.__subclasses__()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Slicing" in done.stdout.split()
