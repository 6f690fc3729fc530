"""The operator: turns custom resources into running jobs, on a cluster or as local processes."""
