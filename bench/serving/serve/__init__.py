"""How fast is a sub-network served, beside CTranslate2?

One dense network, ours in float32 and exported to CTranslate2 in float32 and int8, translates the
same batches in turns in one process. Both search without a length penalty, where they rank alike,
and what CTranslate2 finds in float32 is compared with ours before anything is timed.
"""
