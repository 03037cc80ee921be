"""``python -m qemu_postcopy.images``: the image commands without the rest of the tool."""

from __future__ import annotations

import sys

from qemu_postcopy.errors import PostcopyError
from qemu_postcopy.images.commands import images_commands


def main() -> None:
    try:
        images_commands(prog_name="python -m qemu_postcopy.images")
    except PostcopyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
