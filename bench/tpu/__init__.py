"""The TPU compile lab: what does the TPU compiler make of kernels and models, without a TPU?"""
