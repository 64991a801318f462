"""Measurements that print a table and write JSON with machine, commit, date and seeds; `python -m benchmarks.NAME --help`."""
