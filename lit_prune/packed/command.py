"""The verb `lit-prune unpack`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_prune.errors import InputError
from lit_prune.files import atomic_write

DESCRIPTION = "Write the ordinary Hugging Face folder of a packed one: the same weights, bit for bit, zeros stored."


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see lit-prune unpack --help)")


def run(args: Sequence[str]) -> None:
    """Unpacks the folder that the arguments of the verb name.

    Raises:
        InputError: for a folder that is not packed or is damaged, and for an output that exists.
    """
    parser = _Parser("lit-prune unpack", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Packed folder.")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="Folder to write; it must not exist.")
    arguments: Any = parser.parse_args(args)
    unpack(arguments.folder.expanduser(), arguments.output.expanduser())
    print(arguments.output)


def unpack(folder: Path, output: Path) -> None:
    """Writes the ordinary folder of the packed ``folder`` to ``output``, which is there only once it is complete."""
    if not (folder / "config.json").is_file():
        raise InputError(f"`folder` must be a packed Hugging Face folder, got {folder}: it has no config.json.")
    if output.exists():
        raise InputError(f"`output` must be a new folder, got {output}, which exists: choose another.")
    from lit_prune.packed.unpack import unpack_folder  # imports torch

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as draft:
        try:
            unpack_folder(folder, draft)
        except ValueError as error:
            raise InputError(f"`folder` cannot be unpacked: {error}") from error
