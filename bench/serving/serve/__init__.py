"""How fast is a sub-network served, beside CTranslate2?

One dense network, ours and exported to CTranslate2, each in float32 and int8 and in a process of
its own, translates the same batches in turns. Both search without a length penalty, where they rank
alike, and what CTranslate2 finds in float32 is compared with ours before anything is timed.
"""
