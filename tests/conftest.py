import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--decodes", type=int, default=150, help="random decodes of tests/test_engine.py's fuzz (%(default)s)")
