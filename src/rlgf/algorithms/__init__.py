"""Algorithms as data; advantages, losses and schedules as plain functions."""
