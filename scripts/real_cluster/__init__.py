"""A real Kubernetes on this machine, thrown away afterwards: built, started, filled with images, ended."""
