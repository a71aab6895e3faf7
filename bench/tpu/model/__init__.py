"""The paper's models on TPU: what fits, what travels, and how long does a step take (modelled)?"""
