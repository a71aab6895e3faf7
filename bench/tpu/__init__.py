"""What does the TPU compiler make of kernels and models, without a TPU?

With --kernels each kernel is compiled by libtpu for each chip. Bundles of the main loop, the share
of MXU slots that it fills and its spills are read from the compiler's dumps, bytes are counted by
walking the grid, and times are modelled from both: nothing is measured, and every such figure is
headed so. jax's megablox kernels, and tokamax's where installed, stand beside ours at the same
shapes. With --model wmt, the paper's models instead: parameters, HBM, largest batches, exchange.
With --published, how far the model's times are from measurements that others published.
"""
