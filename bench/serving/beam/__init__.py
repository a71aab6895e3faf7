"""How near does beam search come to the time that reading its weights takes?

The floor of a step is weights and cache read once at this machine's measured memory bandwidth: the
best of a copy and of one row times a large matrix. A step's time is the difference of a long and a
short search over their difference in positions, so that encoder and set-up do not count. Beside it
stand the steps without the search around them (no ranking, no reordering of the cache), and the
time of the arithmetic alone at the rate of this machine's largest product.
"""
