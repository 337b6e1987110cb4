"""`make bench`: what the figures in docs/benchmarks.md are measured with, on real servers."""
