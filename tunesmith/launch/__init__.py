"""Starting a run's processes: on this machine, under mpirun, in a SLURM job."""
