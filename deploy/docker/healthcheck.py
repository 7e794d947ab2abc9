"""Ask this container's own process whether it serves; status 0 if it does. The images' HEALTHCHECK.

A worker answers on DYN_SYSTEM_PORT, a frontend on DYN_HTTP_PORT. No proxy is asked: the process is here.
"""

import http.client
import os
import sys

EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 (asks there, does not listen)

listens = "DYN_SYSTEM" if os.environ.get("DYN_SYSTEM_PORT") else "DYN_HTTP"
host = os.environ.get(f"{listens}_HOST", "")
port = int(os.environ.get(f"{listens}_PORT") or 8000)

connection = http.client.HTTPConnection("127.0.0.1" if host in EVERYWHERE else host, port, timeout=4)
try:
    connection.request("GET", "/health")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"no answer on {host or '127.0.0.1'}:{port}: {error}")
sys.exit(status != http.HTTPStatus.OK)
