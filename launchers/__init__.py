"""Launching on one machine, on Slurm, and scaling studies."""
