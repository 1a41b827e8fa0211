"""Schedules of compiled TPU kernels, read without a TPU."""
