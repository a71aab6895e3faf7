"""What does the exchange between devices cost, and what does a sub-network save by having none?

One Mixture-of-Experts layer, decoding-sized (a token a sequence), and a whole decoding step, on N
host devices, in one process or in several over loopback: each strategy of `taskmoe.moe`, the same
with every part kept instead of sent, and a task's extracted sub-network on every device. Results
are checked against one device before anything is timed. Shares come from the profiler, and from
what the program takes less when it keeps what it would send.
"""
