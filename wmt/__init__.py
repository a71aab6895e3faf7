"""Reference multilingual translation system built on `taskmoe.moe`."""
