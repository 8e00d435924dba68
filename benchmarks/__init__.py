"""What scripts/benchmark.py runs: each measurement is a function run(args) -> dict. Imports every room."""
