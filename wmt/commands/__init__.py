"""The commands of `python -m taskmoe.wmt`, a file each."""
