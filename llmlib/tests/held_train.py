"""``llmlib.train`` that waits at step HOLD_AT until it is told to stop, so that it cannot end."""

import os
import sys
import time

from llmlib import train

go_on = train.Trainer._next_progress


def hold(self):
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    while is_first and self.progress.step >= int(os.environ["HOLD_AT"]) and not self.must_stop():
        time.sleep(0.01)
    return go_on(self)


train.Trainer._next_progress = hold
if __name__ == "__main__":
    sys.exit(train.main())
