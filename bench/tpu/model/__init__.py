"""What fits on a TPU of the paper's models, what travels, and how long is a step (modelled)?

What the compiler decides is a fact: HBM needed, the largest batch that compiles, the collectives of
a step and the bytes they carry. Times are modelled from these facts:

    compute        the compiler's own estimate where it gives one, and the roofline: the larger of
                   FLOPs at the bf16 peak and the bytes that a step must read at the HBM's rate
    communication  bytes over the busiest link / its bandwidth + `HOP_S` a hop a collective
    step           compute + communication: no overlap
"""
