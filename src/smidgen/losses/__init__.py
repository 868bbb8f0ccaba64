"""Losses: functions of tensors, nothing else."""
