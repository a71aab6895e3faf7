"""Eight host devices, as the commands have."""

from taskmoe.bench.serving import systems

systems.use_host_devices(8)
