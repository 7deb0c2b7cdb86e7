"""Measuring: clocks, memory meters and sweeps."""
