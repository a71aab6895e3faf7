"""By how much do the kernels' block sizes miss the best, on a chip and at a model's sizes?

Block sizes are chosen by one rule, from an estimate of time (`taskmoe.kernels.tiling`). Here the
rule's choice and its neighbours, taller, lower, wider, narrower and cut otherwise, are compiled for
the chip and modelled by the compile lab: nothing is measured, and no TPU is needed.
"""
