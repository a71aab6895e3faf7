"""How a process of a run of several ended."""

import re
import signal
import subprocess

#: Process 0 runs JAX's coordination service. Seldom (seen once on jaxlib 0.10) gRPC aborts in that
#: server's destructor, when all work is done and kept: a call came while the server shut down.
GRPC_ABORTS = r"F\d{4} .* server\.cc:\d+\] Check failed: queue\.Pop\(\) == nullptr"


def ended(process: subprocess.Popen[str], code: int, timeout: float = 300) -> tuple[str, str]:
    """What a process that ends with this code printed: on stdout, and on stderr."""
    said, errors = process.communicate(timeout=timeout)
    ours, *aborted = re.split(GRPC_ABORTS, errors)
    assert process.returncode == (-signal.SIGABRT if aborted else code), errors
    return said, ours
