"""Measure the engine: `python -m jaxinfer.bench`, see `--help` and docs/benchmarks.md."""
