"""The Mixture-of-Experts layer over `taskmoe.kernels`."""
