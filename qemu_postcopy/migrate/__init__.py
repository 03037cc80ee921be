"""Moving a running guest to another host, driven from before it starts to its last page.

``checks`` looks at both hosts first; an ``engine`` moves the guest (``native``: QEMU's own pre-copy
and post-copy, by libvirt); ``policy`` decides when to switch; ``drive`` is the state machine that
puts them together, ``progress`` and ``report`` tell of it, ``commands`` is the command line.
"""
