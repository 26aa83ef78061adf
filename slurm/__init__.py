"""Jobs on SLURM or on this machine: submission, the processes inside a job, and the log that follows a job.

`job` and `cluster` import no torch: every process of a job imports them beside the program that it runs.
"""
