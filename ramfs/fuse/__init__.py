"""The mount. The only room that knows pyfuse3; it translates requests and nothing else."""
