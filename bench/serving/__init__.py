"""Decoding as it is served: how do dense, token-routed and task-routed models compare?"""
