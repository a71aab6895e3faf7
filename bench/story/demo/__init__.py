"""Does the paper's story hold on one machine: train, extract, score, serve, in ten minutes?

Trains a dense model, a token-routed and a task-routed mixture of equal compute per token on the 30
directions of the embedded corpus, cuts every task's sub-network out and checks it against the full
model, scores all of them, serves the token-routed model expert-parallel and the sub-networks on the
same eight host devices, and writes a report with charts and a JSON file. Started again it goes on
where it was stopped.
"""
