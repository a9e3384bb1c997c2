"""moectl with small fakes in place of its parts, all but Prometheus; KEEP names parts that stay real."""

import os
from pathlib import Path

from moe_cli import stack
from moe_cli.main import main

HERE = Path(__file__).parent
FAKES = {"checkpoint": "fake_step.py", "serving": "fake_serving.py", "gateway": "fake_part.py", "tuner": "fake_part.py"}

if __name__ == "__main__":
    for part, script in FAKES.items():
        if part not in os.environ.get("KEEP", "").split():
            stack.PROGRAMS[part] = (str(HERE / script),)
    stack.SERVING_STOP_S = 2.0
    main()
