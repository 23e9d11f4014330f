"""Makes align_student.py importable, a student small enough for milliseconds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
