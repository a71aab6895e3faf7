"""How near does each kernel come to the roofline, as compiled for TPU (modelled)?"""
