"""Experiments whose figures the documentation prints: training runs, hours rather than seconds."""
