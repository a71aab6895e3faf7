"""What does each way of routing gain at equal compute, and what do its rivals keep of it?

Reads the folder of a study, one folder a system and seed with its scores and translations. Draws
intervals for the differences by paired bootstrap over the test sentences, counts the parameters of
each system and of what serves one direction, compares every extracted sub-network's translations
of the validation text with the whole model's, and times the decoding of one direction, systems in
turns.
"""
