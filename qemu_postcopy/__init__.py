"""Pages the memory of QEMU/KVM guests on demand.

A snapshot of a guest of a stock QEMU resumes in a fraction of a second: the device state is loaded
at once, the memory follows when the guest touches it.  The two flows, and the words used here, are
described in the README ("Design").
"""

__version__ = "0.1.0.dev0"
