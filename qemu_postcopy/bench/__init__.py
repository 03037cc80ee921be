"""Measurements of this host: ours against the least that must be done, as ratios within one run."""
