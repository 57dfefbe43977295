"""Governor beside what one would use in its place, in one run: ``python -m benchmarks``."""
