"""A mount that outlives its daemon: the process that keeps the connection, and how others talk to it."""
