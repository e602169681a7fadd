"""`ced` on a control host whose clock is twenty hours late: what it signs for a day is half over by now."""

import sys
import time

sys.path.insert(0, "/usr/local/lib/ctrl-exec")
import ctrl_exec  # noqa: E402

ctrl_exec.now = lambda: time.time() - 20 * 3600
ctrl_exec.leave(ctrl_exec.main(["ced", *sys.argv[1:]]))
