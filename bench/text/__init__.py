"""How fast is text made ready for training, and what would WMT's 431 million pairs take?

Generated text in 16 directions of very unequal size, with duplicates and held-out sentences
planted, becomes a training set; then batches are drawn from it. What is measured is carried over to
the paper's text, and to a machine of 64 cores.
"""
