import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from exercises import EXERCISES


def pytest_addoption(parser):
    parser.addoption("--decodes", type=int, default=100,
                     help="random decodes of tests/test_engine.py's fuzz (%(default)s)")


def pytest_configure(config):
    """`-k exercise_4` stands for the names of the tests that mark exercise 4, to the first that
    fails."""
    torch.set_num_threads(1)  # the models of tests are too small for two
    config.marks = []
    numbered = re.fullmatch(r"exercise_0?(\d+)", config.option.keyword)
    if numbered and 1 <= int(numbered[1]) <= len(EXERCISES):
        config.marks = EXERCISES[int(numbered[1]) - 1].marks
        config.option.keyword = " or ".join(config.marks)
        config.option.maxfail = 1


def pytest_ignore_collect(collection_path, config):
    """Files without such a test are not imported: it takes time, and some use the functions that
    may be empty as they are imported."""
    if config.marks and collection_path.suffix == ".py":
        source = collection_path.read_text(encoding="utf-8")
        if not any(f"def {mark}(" in source for mark in config.marks):
            return True
