"""C programs that benches and tests measure the pager with; compiled by the system's compiler."""
