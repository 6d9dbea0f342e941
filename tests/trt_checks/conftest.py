"""These files are no tests to pytest by their names: tests/test_tensorrt.py runs each in a process
of its own, because torch_tensorrt without a GPU needs that."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
