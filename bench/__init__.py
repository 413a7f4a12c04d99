"""The benchmark of one layer of routed experts: `python -m bench --help`."""
