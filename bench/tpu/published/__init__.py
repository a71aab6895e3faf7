"""How far are modelled times from measurements that others published?

tokamax ships what its autotuning measured on TPUs, ragged_dot in bf16 among it. Our gmm is compiled
for the same chip at the same sizes, once with the blocks that it chooses and once with those that
tokamax was fastest with, and modelled as every kernel here is: the larger of bytes at the HBM's
rate and the work of all regions of the schedule, plus what XLA runs outside. Ours is modelled,
theirs is published; what the model leaves out (time to start, copies that wait) is its error.
"""
