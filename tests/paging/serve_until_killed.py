"""A sidecar to be killed: serves a userfaultfd that it was given, and ends by SIGKILL only.

Arguments: the descriptor, then address, length and page size of the block, the ledger, the source
(a descriptor) and its offset, and the bitmap (a file); last, "unprivileged" for a server without
rights that may have a real-time priority all the same, where this host lets us give it that (needs
CAP_SYS_RESOURCE).  Says "serving" when it is.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock
from qemu_postcopy.paging.source import FileSource

userfaultfd, address, length, page_size = map(int, sys.argv[1:5])
ledger = Ledger.create(Path(sys.argv[5]), [LedgerBlock("m0", page_size, length)])
block = PagerBlock(
    name="m0",
    address=address,
    length=length,
    page_size=page_size,
    source=FileSource(int(sys.argv[6])),
    source_offset=int(sys.argv[7]),
    data_bitmap=Path(sys.argv[8]).read_bytes(),
)
if sys.argv[9:] == ["unprivileged"]:
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_RTPRIO, (1, 1))
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
pager = Pager(userfaultfd, [block], ledger, chunk_size=4096, background=False)
pager.start()
print("serving", flush=True)
signal.pause()
