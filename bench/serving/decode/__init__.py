"""How many tokens a second do dense, token-routed and task-routed models decode?

Eight host devices serve each system: one dense replica a device; one task's sub-network a device;
or one token-routed model over all of them, expert-parallel, dropless and with GShard's capacity.
Parameters are random unless --models names trained ones; random ones get their tokens given, drawn
at random, so that their routers spread them. Before anything is timed, what each system finds
likely is compared with the whole model on one device.
"""
