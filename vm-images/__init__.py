"""Test guests: images built from the distribution's own packages, and what they say on the console.

- ``builder``: makes (and caches) a kernel and an initramfs with our guest programs;
- ``guest_image``: what was made, and the kernel command line that tells the guest what to do;
- ``console``: the guest's lines as typed records;
- ``micro_guest``: a ROM that verifies memory without an operating system, for KVM;
- ``qemu_versions``, ``libvirt_versions``: another QEMU, another libvirt beside the host's own, from
  ``other_suite``;
- ``commands``: all that on the command line (``python -m qemu_postcopy.images``).
"""
