"""The same guests as in tests/vm."""

from vm.conftest import lab, qemu, snapshots

__all__ = ["lab", "qemu", "snapshots"]
