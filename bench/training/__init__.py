"""How fast does training run, and where does a step's time go?

One step of the dense, the token-routed and the task-routed model, all with equal compute a token,
cut into forward pass, backward pass and optimiser. Beside them runs a plain PyTorch implementation
of the same dense model, where torch is installed: same parameters, so that losses must be equal.
"""
