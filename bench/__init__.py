"""Benchmarks of sharpkern against eager, compiled and third-party SAM optimizers."""
