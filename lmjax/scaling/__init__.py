"""Costs of models and rates of machines: parameters, FLOPs, peaks, memory."""
