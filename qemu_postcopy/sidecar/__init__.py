"""The serving process: its run directory, its control socket, and how others ask it."""
