"""Ops: how fast is each op beside what others offer for the same work, and beside the machine?"""
