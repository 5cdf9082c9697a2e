"""Reports: one self-contained page and a Markdown file from run directories, and from nothing else."""
