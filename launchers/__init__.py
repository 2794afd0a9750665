"""Where a run runs: on this machine or on Slurm, through nemo-run. See docs/slurm.md."""
