"""Started by launchers in tests: the processes meet, and the first one writes who was there.

python tests/scripts/meeting.py OUTPUT.json [--wait] [--code N] [flags that launchers add]
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine import distributed, stop
from engine.errors import Stopped
from scripts.program import run


def main() -> None:
    """Meet, write, and with ``--wait`` stay until a signal comes, as training does."""
    output, words = next((word for word in sys.argv[1:] if word.endswith(".json")), None), sys.argv[1:]
    distributed.init("cpu", timeout_s=60)
    placement = distributed.placement_from_environment() or distributed.Placement()
    row = {"rank": distributed.rank(), "world_size": distributed.world_size(), "local_rank": placement.local_rank}
    row |= {"words": words, "cores": distributed.cores_per_process(), "threads": os.environ.get("OMP_NUM_THREADS")}
    rows = distributed.gather_objects(row | {"group_rank": os.environ.get("GROUP_RANK")})
    try:
        with stop.listening():
            if distributed.is_main():
                Path(output + ".part").write_text(json.dumps(rows), encoding="utf-8")
                os.replace(output + ".part", output)
            while "--wait" in words:
                if number := stop.asked():
                    raise Stopped(number, "left the meeting")
                time.sleep(0.05)
    finally:
        if distributed.is_main():
            time.sleep(0.3)  # as if it closed its logs: the others leave first, upon which launchers end this one
    distributed.barrier()
    distributed.shutdown()
    if "--code" in words:
        raise SystemExit(int(words[words.index("--code") + 1]))


if __name__ == "__main__":
    run(main)
