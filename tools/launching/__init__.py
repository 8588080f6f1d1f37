"""Launchers of distributed training: this machine, Slurm, Kubernetes."""
