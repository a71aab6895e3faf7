"""What does task routing cost, beside a dense FFN of the same width?

The layer with a scalar task and the dense layer of width top_k * d_ff run in turns in one process,
forward, and forward plus backward (gradients for the input and every parameter; the mixture's has a
matrix for each expert to fill). An extracted sub-network runs beside them. Results are checked
against each other first.
"""
