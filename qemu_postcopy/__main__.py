"""``python -m qemu_postcopy``."""

from qemu_postcopy.cli import main

main()
