"""The regression gate: did a change make compiled kernels, exchanges or speeds worse?

Static facts (kernels compiled for TPU without one: bundles, MXU slots, spills, VMEM; collectives
and their bytes in the HLO of expert-parallel layers) are compared exactly with those stored: worse
by more than 2%, or a new collective, is a regression. Speeds of a training step and of decoding are
ratios to a frozen calibration that runs in turns with them. They are compared with another revision
measured beside this one (--against REV), or with those stored where they were measured on this
machine; a time whose interval lies wholly above 8% more is a regression. Exit code 1 on a
regression, with a last line that names it.
"""
