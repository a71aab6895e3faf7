"""Does the paper's story hold on one machine: train, extract, score, serve, in ten minutes?

Trains the paper's narrow dense model, and a dense, a token-routed and a task-routed one of equal
compute per token, on ten directions of the embedded corpus. Cuts every task's sub-network out and
checks it against the full model, scores all of them, serves the token-routed model expert-parallel
and the sub-networks on the same host devices, and writes a report with charts and a JSON file.
Started again it goes on where it was stopped.
"""
