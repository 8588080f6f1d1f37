"""Launchers of distributed training on this machine, under Slurm and on Kubernetes."""
