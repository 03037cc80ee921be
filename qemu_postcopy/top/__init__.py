"""``qemu-postcopy top``: all guests of this user on one screen, by the keyboard."""
