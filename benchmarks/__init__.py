"""What users will run before they believe anything. See README.md.

Importing the package makes the starters of proxies (tests/wire/proxy.py, areal_env.py) and the tokenizer
(tests/qwen_folder.py) importable, whichever way a program of it is started.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "wire"), str(ROOT / "tests")]
