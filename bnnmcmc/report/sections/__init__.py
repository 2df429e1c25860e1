"""The sections of a run's report, a file each: plain functions of what the folder holds."""
