"""From a manifest to processes: admission, volumes, TorchX application, local run.

The only place that knows the workers' command lines.
"""
