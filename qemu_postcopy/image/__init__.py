"""Images: a guest's memory and device state at rest, made so that the memory can come later."""
