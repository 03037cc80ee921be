"""Serving faults: the pager (C), its ledger, and the sources that page data comes from."""
