"""``qemu-postcopy report``: a trace of faults as one HTML page."""
