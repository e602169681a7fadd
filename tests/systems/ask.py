"""One request to the HTTP API: `ask.py PATH [JSON]` prints its answer."""

import sys
import urllib.request

path, *body = sys.argv[1:]
data = body[0].encode() if body else None
request = urllib.request.Request("http://127.0.0.1:7445" + path, data, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=120) as answer:
    print(answer.read().decode())
