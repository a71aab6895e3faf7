"""The regression gate: did a change make compiled kernels, exchanges or speeds worse?"""
