"""QEMU from the outside: launching or finding it, its monitor, its memory layout, the attach."""
