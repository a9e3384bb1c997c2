"""moectl with small fakes in place of engine, tuner and checkpoint step; gateway and Prometheus are the real ones."""

from pathlib import Path

from moe_cli import stack
from moe_cli.main import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    stack.PROGRAMS["checkpoint"] = (str(HERE / "fake_step.py"),)
    stack.PROGRAMS["serving"] = (str(HERE / "fake_serving.py"),)
    stack.PROGRAMS["tuner"] = (str(HERE / "fake_tuner.py"),)
    stack.SERVING_STOP_S = 2.0
    main()
