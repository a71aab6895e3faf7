"""What makes a token-routed model learn faster or more slowly than a dense one?

Trains the demo's dense and token-routed models, and the token-routed one again with one thing
changed at a time, all for equally many steps on the same text. Compares their losses on text that
none has seen, and draws every curve.
"""
